// The selected keys of a row: where they lie (logical positions, a request's page table, storage rows), how they are
// gathered, and their products with queries.
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

constexpr int STRIPE = 64;  // rows whose gradients for keys are kept together

// n rows of `width` values side by side, `wide` from one to the next.
inline void gather(const float* from, int64_t step, const int32_t* rows, int n, int width, float* to, int wide) {
  for (int j = 0; j < n; j++) memcpy(to + (size_t)j * wide, from + rows[j] * step, (size_t)width * 4);
}

// The same as columns, [group][wide][16], zeros behind the last; there is room for whole groups of rows.
inline void turn(float* values, int n, int wide, float* columns) {
  const int padded = (n + GROUP - 1) / GROUP * GROUP;
  memset(values + (size_t)n * wide, 0, (size_t)(padded - n) * wide * 4);
  for (int g = 0; g < padded / GROUP; g++)
    for (int d = 0; d < wide; d++)
      for (int l = 0; l < GROUP; l++) columns[((size_t)g * wide + d) * GROUP + l] = values[(size_t)(g * GROUP + l) * wide + d];
}

// out[h][16] = x[h] . each of a group's keys, over the first `dims` dims, for all heads.
inline void products(const float* group, const float* x, int heads, int stride, int dims, float* out, int64_t step) {
  for (int h = 0; h < heads; h += 4) {
    const int some = std::min(4, heads - h);
    vf dot[4][PARTS] = {};
    if (some == 4) {
      for (int d = 0; d < dims; d++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
          for (int v = 0; v < PARTS; v++) dot[i][v] += load(group + d * GROUP + v * LANES) * splat(x[(h + i) * stride + d]);
    } else {
      for (int i = 0; i < some; i++)
        for (int d = 0; d < dims; d++)
          for (int v = 0; v < PARTS; v++) dot[i][v] += load(group + d * GROUP + v * LANES) * splat(x[(h + i) * stride + d]);
    }
    for (int i = 0; i < some; i++)
      for (int v = 0; v < PARTS; v++) store(out + (h + i) * step + v * LANES, dot[i][v]);
  }
}

// y += a x
inline void add(float* y, const float* x, float a, int n) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, load(y + i) + load(x + i) * splat(a));
  for (; i < n; i++) y[i] += x[i] * a;
}

// Thread of the calling team, and how many there are.
inline void team(int& me, int& all) {
#ifdef _OPENMP
  me = omp_get_thread_num(), all = omp_get_num_threads();
#else
  me = 0, all = 1;
#endif
}
}  // namespace
