// Routed SwiGLU experts, grouped by expert (architecture spec 2.9), for one token as for thousands.
//
// Every product is a dot product along the weights' rows as they lie: lanes of the vector hold partial sums,
// which are added at the end. An output's bits depend on its token and its weights alone, so decoding and
// prefill agree. A row's k results are added in the order of its choices.
#include "common.h"

namespace {
constexpr int TOKENS = 4, OUTPUTS = LANES == 16 ? 4 : 2;  // of one tile of registers

inline float sum_lanes(vf x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float half[LANES];
  store(half, x);
  for (int n = LANES / 2; n; n /= 2)
    for (int l = 0; l < n; l++) half[l] += half[l + n];
  return half[0];
#endif
}

// dots[t][o] = a[t] . w[o] for rows of `n` floats.
template <int T, int O> inline void dots_f32(const float* const* a, const float* w, int64_t stride, int n, float (*dots)[OUTPUTS]) {
  vf acc[T][O];
#pragma GCC unroll 8
  for (int t = 0; t < T; t++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) acc[t][o] = vf{};
  int d = 0;
  for (; d + LANES <= n; d += LANES) {
    vf row[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) row[o] = load(w + o * stride + d);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      vf x = load(a[t] + d);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) acc[t][o] += x * row[o];
    }
  }
  for (int t = 0; t < T; t++)
    for (int o = 0; o < O; o++) {
      float tail = 0;
      for (int i = d; i < n; i++) tail = std::fma(a[t][i], w[o * stride + i], tail);
      dots[t][o] = sum_lanes(acc[t][o]) + tail;
    }
}

#ifdef __AVX512BF16__
template <int T, int O> inline void dots_bf16(const uint16_t* const* a, const uint16_t* w, int64_t stride, int n, float (*dots)[OUTPUTS]) {
  __m512 acc[T][O];
#pragma GCC unroll 8
  for (int t = 0; t < T; t++)
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) acc[t][o] = _mm512_setzero_ps();
  int d = 0;
  for (; d + 32 <= n; d += 32) {
    __m512bh row[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) row[o] = (__m512bh)_mm512_loadu_si512(w + o * stride + d);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      __m512bh x = (__m512bh)_mm512_loadu_si512(a[t] + d);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) acc[t][o] = _mm512_dpbf16_ps(acc[t][o], x, row[o]);
    }
  }
  if (d < n) {
    __mmask32 there = (1u << (n - d)) - 1;
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      __m512bh x = (__m512bh)_mm512_maskz_loadu_epi16(there, a[t] + d);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++)
        acc[t][o] = _mm512_dpbf16_ps(acc[t][o], x, (__m512bh)_mm512_maskz_loadu_epi16(there, w + o * stride + d));
    }
  }
  for (int t = 0; t < T; t++)
    for (int o = 0; o < O; o++) dots[t][o] = _mm512_reduce_add_ps(acc[t][o]);
}
#endif

template <class X> struct Rows;  // dot products of T rows with O rows of weights
template <> struct Rows<float> {
  template <int T, int O> static void dots(const float* const* a, const float* w, int64_t stride, int n, float (*out)[OUTPUTS]) {
    dots_f32<T, O>(a, w, stride, n, out);
  }
};
#ifdef __AVX512BF16__
template <> struct Rows<uint16_t> {
  template <int T, int O> static void dots(const uint16_t* const* a, const uint16_t* w, int64_t stride, int n, float (*out)[OUTPUTS]) {
    dots_bf16<T, O>(a, w, stride, n, out);
  }
};
#endif

// For `count` rows and weights' rows [from, to): take(row number, output, value).
template <class X, class Take> void products(const X* const* rows, int count, const X* w, int64_t stride, int n, int from, int to, Take take) {
  float out[TOKENS][OUTPUTS];
  for (int t = 0; t < count;) {
    int some = count - t >= TOKENS ? TOKENS : 1;
    for (int o = from; o < to;) {
      int wide = to - o >= OUTPUTS ? OUTPUTS : 1;
      const X* at = w + (int64_t)o * stride;
      if (some == TOKENS && wide == OUTPUTS) Rows<X>::template dots<TOKENS, OUTPUTS>(rows + t, at, stride, n, out);
      else if (some == TOKENS) Rows<X>::template dots<TOKENS, 1>(rows + t, at, stride, n, out);
      else if (wide == OUTPUTS) Rows<X>::template dots<1, OUTPUTS>(rows + t, at, stride, n, out);
      else Rows<X>::template dots<1, 1>(rows + t, at, stride, n, out);
      for (int i = 0; i < some; i++)
        for (int j = 0; j < wide; j++) take(t + i, o + j, out[i][j]);
      o += wide;
    }
    t += some;
  }
}

inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) { *to = narrow(x); }

template <class X>
void run(const X* x, const int64_t* ids, const float* weights, const X* gate_up, const X* down, int64_t tokens, int k, int experts, int dim,
         int width, X* out, int threads) {
  const int64_t slots = tokens * k;
  std::vector<int64_t> first((size_t)experts + 1), order((size_t)slots);
  for (int64_t s = 0; s < slots; s++) first[(size_t)ids[s] + 1]++;
  for (int e = 0; e < experts; e++) first[(size_t)e + 1] += first[(size_t)e];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t s = 0; s < slots; s++) order[(size_t)next[(size_t)ids[s]]++] = s;
  std::vector<int> used;
  for (int e = 0; e < experts; e++)
    if (first[(size_t)e + 1] > first[(size_t)e]) used.push_back(e);
  Aligned<X> hidden((size_t)slots * width);       // in the order of experts
  Aligned<float> result((size_t)slots * dim);     // by slot
  const int block = 32, wide_blocks = (width + block - 1) / block, dim_blocks = (dim + block - 1) / block;
#pragma omp parallel num_threads(threads)
  {
    std::vector<const X*> rows;
    std::vector<float> gate, up;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)used.size() * wide_blocks; i++) {
      int e = used[(size_t)(i / wide_blocks)], from = (int)(i % wide_blocks) * block, to = std::min(width, from + block);
      int64_t begin = first[(size_t)e];
      int n = (int)(first[(size_t)e + 1] - begin);
      rows.resize((size_t)n);
      gate.resize((size_t)n * block);
      up.resize((size_t)n * block);
      for (int r = 0; r < n; r++) rows[(size_t)r] = x + order[(size_t)(begin + r)] / k * dim;
      const X* w = gate_up + (int64_t)e * 2 * width * dim;
      products(rows.data(), n, w, dim, dim, from, to, [&](int r, int o, float v) { gate[(size_t)(r * block + o - from)] = v; });
      products(rows.data(), n, w + (int64_t)width * dim, dim, dim, from, to, [&](int r, int o, float v) { up[(size_t)(r * block + o - from)] = v; });
      for (int64_t i = 0; i < (int64_t)n * block; i += LANES) {  // silu(gate) * up; what lies beyond `to` is not kept
        vf g = load(gate.data() + i);
        store(gate.data() + i, g / (splat(1.f) + vexp(-g)) * load(up.data() + i));
      }
      for (int r = 0; r < n; r++)
        for (int o = from; o < to; o++) put(hidden.data + (begin + r) * width + o, gate[(size_t)(r * block + o - from)]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (int64_t)used.size() * dim_blocks; i++) {
      int e = used[(size_t)(i / dim_blocks)], from = (int)(i % dim_blocks) * block, to = std::min(dim, from + block);
      int64_t begin = first[(size_t)e];
      int n = (int)(first[(size_t)e + 1] - begin);
      rows.resize((size_t)n);
      for (int r = 0; r < n; r++) rows[(size_t)r] = hidden.data + (begin + r) * width;
      products(rows.data(), n, down + (int64_t)e * dim * width, width, width, from, to,
               [&](int r, int o, float v) { result.data[order[(size_t)(begin + r)] * dim + o] = v; });
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
      for (int d = 0; d < dim; d++) {
        float sum = 0;
        for (int j = 0; j < k; j++) sum = std::fma(weights[t * k + j], result.data[(t * k + j) * dim + d], sum);
        put(out + t * dim + d, sum);
      }
  }
}
}  // namespace

// x [tokens, dim], ids and weights [tokens, k], gate_up [experts, 2 width, dim] (gate rows first), down [experts, dim, width].
// Returns 0, or 1 if this library has no bf16 products.
EXPORT int nanoglm_experts(int bf16, const void* x, const int64_t* ids, const float* weights, const void* gate_up, const void* down, int64_t tokens, int k,
                           int experts, int dim, int width, void* out, int threads) {
  if (!bf16) {
    run((const float*)x, ids, weights, (const float*)gate_up, (const float*)down, tokens, k, experts, dim, width, (float*)out, threads);
    return 0;
  }
#ifdef __AVX512BF16__
  run((const uint16_t*)x, ids, weights, (const uint16_t*)gate_up, (const uint16_t*)down, tokens, k, experts, dim, width, (uint16_t*)out, threads);
  return 0;
#else
  return 1;
#endif
}
