// Where the selected keys of a row lie: logical positions, a request's page table, storage rows.
#pragma once
#include "common.h"

namespace {
struct Selected {
  const int32_t* selection;  // [T, K] logical positions, -1 after the valid ones
  const int64_t* requests;   // [T] whose page table, [B, columns], translates them
  const int32_t* table;
  int64_t columns, page_size;
  int64_t count;  // T
  int k;
  std::vector<int64_t> run;  // of each request the storage row of position 0 if its pages lie in a row, else -1
};

// A request alone in a cache has its pages in a row, and so has a whole sequence: nothing to look up then.
inline std::vector<int64_t> runs(const Selected& p) {
  std::vector<int64_t> run((size_t)(p.count ? *std::max_element(p.requests, p.requests + p.count) + 1 : 0), -1);
  for (size_t r = 0; r < run.size(); r++) {
    const int32_t* pages = p.table + (int64_t)r * p.columns;
    int32_t gaps = 0;
    for (int64_t i = 1; i < p.columns; i++) gaps |= pages[i] - pages[i - 1] - 1;
    if (!gaps) run[r] = pages[0] * p.page_size;
  }
  return run;
}

// Storage rows of the first `most` selected positions of row t; returns how many there are.
inline int storage_rows(const Selected& p, int64_t t, int most, int32_t* __restrict rows) {
  const int32_t *chosen = p.selection + t * p.k, *pages = p.table + p.requests[t] * p.columns;
  const int n = chosen[most - 1] >= 0 ? most : (int)(std::partition_point(chosen, chosen + most, [](int32_t s) { return s >= 0; }) - chosen);
  if (const int64_t first = p.run[(size_t)p.requests[t]]; first >= 0)
    for (int i = 0; i < n; i++) rows[i] = (int32_t)first + chosen[i];
  else if (p.page_size == BLOCK)
    for (int i = 0; i < n; i++) rows[i] = pages[chosen[i] / (uint32_t)BLOCK] * BLOCK + chosen[i] % (uint32_t)BLOCK;
  else
    for (int i = 0; i < n; i++) rows[i] = (int32_t)(pages[chosen[i] / p.page_size] * p.page_size + chosen[i] % p.page_size);
  return n;
}

}  // namespace
