// Routed SwiGLU experts with int8 weights, a scale per output; activations are quantised row by row on the way.
//
// Made for decoding, which is all reading of weights. Sums of products are whole numbers, exact in any order, so
// rows of weights are read as they lie: a vector of them, the signs flipped to unsigned, meets a vector of x.
#include "common.h"

namespace {
constexpr int TOKENS = 4;  // that share a row of weights

struct Row {  // int8 values, their scale and, for the flipped signs, minus 128 times their sum
  std::vector<int8_t> values;
  float scale;
  int32_t offset;
  void take(const float* x, int n) {
    values.resize((size_t)n);
    scale = quantise_row(x, n, values.data());
    int32_t sum = 0;
    for (int8_t v : values) sum += v;
    offset = -128 * sum;
  }
};

template <int T> inline void dots(const Row* const* x, const int8_t* w, int n, int32_t* out) {
#ifdef __AVX512VNNI__
  __m512i sum[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_si512();
  for (int d = 0; d < n; d += 64) {
    const __mmask64 there = n - d >= 64 ? ~0ull : (1ull << (n - d)) - 1;
    const __m512i row = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, w + d), _mm512_set1_epi8((char)0x80));
    __builtin_prefetch(w + 4 * (int64_t)n + d, 0, 0);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) dot_bytes(sum[t], row, _mm512_maskz_loadu_epi8(there, x[t]->values.data() + d));
  }
  for (int t = 0; t < T; t++) out[t] = _mm512_reduce_add_epi32(sum[t]) + x[t]->offset;
#else
  for (int t = 0; t < T; t++) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += (int)w[i] * x[t]->values[(size_t)i];
    out[t] = sum;
  }
#endif
}

// take(row, output, x . w[output]) for `count` rows and outputs [from, to) of weights with `n` inputs.
template <class Take> void products(const Row* const* x, int count, const int8_t* w, const float* scale, int n, int from, int to, Take take) {
  int32_t out[TOKENS];
  for (int o = from; o < to; o++)  // rows of weights one by one: memory is read in order
    for (int t = 0; t < count;) {
      const int some = count - t >= TOKENS ? TOKENS : 1;
      if (some == 1) dots<1>(x + t, w + (int64_t)o * n, n, out);
      else dots<TOKENS>(x + t, w + (int64_t)o * n, n, out);
      for (int i = 0; i < some; i++) take(t + i, o, (float)out[i] * x[t + i]->scale * scale[o]);
      t += some;
    }
}
}  // namespace

// x fp32 [tokens, dim], ids and weights [tokens, k], gate_up int8 [experts, 2 width, dim] (gate rows first) with
// scales [experts, 2 width], down int8 [experts, dim, width] with scales [experts, dim], out fp32 [tokens, dim].
EXPORT void nanoglm_experts_int8(const float* x, const int64_t* ids, const float* weights, const int8_t* gate_up, const float* gate_up_scale, const int8_t* down,
                                 const float* down_scale, int64_t tokens, int k, int experts, int dim, int width, float* out, int threads) {
  const int64_t slots = tokens * k;
  std::vector<std::vector<int64_t>> chosen((size_t)experts);  // slots of each expert
  for (int64_t s = 0; s < slots; s++) chosen[(size_t)ids[s]].push_back(s);
  struct Item { int expert, from; };
  std::vector<Item> in, back;
  const int block = 64;
  for (int e = 0; e < experts; e++) {
    if (chosen[(size_t)e].empty()) continue;
    for (int o = 0; o < width; o += block) in.push_back({e, o});
    for (int o = 0; o < dim; o += block) back.push_back({e, o});
  }
  std::vector<Row> rows((size_t)tokens), hidden_rows((size_t)slots);
  std::vector<float> hidden((size_t)(slots * width)), result((size_t)(slots * dim));
#pragma omp parallel num_threads(threads)
  {
    std::vector<const Row*> mine;
    std::vector<float> gate, up;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) rows[(size_t)t].take(x + t * dim, dim);
#pragma omp for schedule(static)
    for (size_t n = 0; n < in.size(); n++) {
      const int e = in[n].expert, from = in[n].from, to = std::min(width, from + block);
      const std::vector<int64_t>& at = chosen[(size_t)e];
      const int count = (int)at.size();
      mine.clear();
      for (int64_t s : at) mine.push_back(&rows[(size_t)(s / k)]);
      gate.resize((size_t)count * block);
      up.resize((size_t)count * block);
      const int8_t* w = gate_up + (int64_t)e * 2 * width * dim;
      const float* scale = gate_up_scale + (int64_t)e * 2 * width;
      products(mine.data(), count, w, scale, dim, from, to, [&](int r, int o, float v) { gate[(size_t)(r * block + o - from)] = v; });
      products(mine.data(), count, w + (int64_t)width * dim, scale + width, dim, from, to, [&](int r, int o, float v) { up[(size_t)(r * block + o - from)] = v; });
      for (int r = 0; r < count; r++) {
        for (int l = 0; l < block; l += LANES) {
          vf g = load(gate.data() + r * block + l);
          store(gate.data() + r * block + l, g / (splat(1.f) + vexp(-g)) * load(up.data() + r * block + l));
        }
        memcpy(hidden.data() + at[(size_t)r] * width + from, gate.data() + r * block, (size_t)(to - from) * 4);
      }
    }
#pragma omp for schedule(static)
    for (int64_t s = 0; s < slots; s++) hidden_rows[(size_t)s].take(hidden.data() + s * width, width);
#pragma omp for schedule(static)
    for (size_t n = 0; n < back.size(); n++) {
      const int e = back[n].expert, from = back[n].from, to = std::min(dim, from + block);
      const std::vector<int64_t>& at = chosen[(size_t)e];
      mine.clear();
      for (int64_t s : at) mine.push_back(&hidden_rows[(size_t)s]);
      products(mine.data(), (int)at.size(), down + (int64_t)e * dim * width, down_scale + (int64_t)e * dim, width, from, to,
               [&](int r, int o, float v) { result[(size_t)(at[(size_t)r] * dim + o)] = v; });
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
      for (int d = 0; d < dim; d++) {
        float sum = 0;
        for (int j = 0; j < k; j++) sum = std::fma(weights[t * k + j], result[(size_t)((t * k + j) * dim + d)], sum);
        out[t * dim + d] = sum;
      }
  }
}
