// Products of rows with weights' rows, y[t, o] = x[t] . w[o], whose bits depend on the row and the weights alone.
//
// Lanes of a vector are outputs, so an output is one chain of sums over the inputs in order (bf16: in pairs), for
// one row as for thousands. Weights lie as in the checkpoint, [outputs, inputs], and are turned on the way: in
// registers for a few rows, into a panel of outputs that stays in the cache for many.
#pragma once
#include "common.h"

namespace {
#if defined(__AVX512F__)
constexpr int VECTORS = 4, ROWS = 6;  // a tile of registers: outputs in vectors, rows
#elif defined(__AVX__)
constexpr int VECTORS = 2, ROWS = 6;
#else
constexpr int VECTORS = 2, ROWS = 4;
#endif
constexpr int PANEL = VECTORS * LANES;  // outputs side by side
constexpr int CHUNK_ROWS = 32 * ROWS;   // that share a panel and its sums
constexpr int DEPTH = 512;              // dwords of inputs in a panel

template <class X> struct Dot;  // X's arithmetic, a dword of inputs at a time
template <> struct Dot<float> {
  static constexpr int PER = 1;
  typedef vf vec;
  static vec add(vec sum, vi w, const float* x) { return sum + (vec)w * splat(*x); }
};
template <> struct Dot<uint16_t> {
  static constexpr int PER = 2;
  typedef vf vec;
  static vec add(vec sum, vi w, const uint16_t* x) {
#ifdef __AVX512BF16__
    int32_t pair;
    memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
#else
    sum += (vf)(w << 16) * splat(widen(x[0]));
    return sum + (vf)(w & (int32_t)0xffff0000) * splat(widen(x[1]));
#endif
  }
};

// The first n lanes of x.
inline void put_some(float* to, vf x, int n) {
  if (n >= LANES) store(to, x);
  else memcpy(to, &x, (size_t)n * 4);
}
inline void put_some(uint16_t* to, vf x, int n) {
#ifdef __AVX512BF16__
  const __m256i y = (__m256i)_mm512_cvtneps_pbh(x);
  if (n >= LANES) _mm256_storeu_si256((__m256i*)to, y);
  else memcpy(to, &y, (size_t)n * 2);
#else
  if (n >= LANES) store(to, x);
  else
    for (int l = 0; l < n; l++) to[l] = narrow(x[l]);
#endif
}

template <class X> inline vf rounded(vf x) { return x; }
template <> inline vf rounded<uint16_t>(vf x) {
#ifdef __AVX512BF16__
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
#else
  for (int l = 0; l < LANES; l++) x[l] = widen(narrow(x[l]));
  return x;
#endif
}

// Rows of dwords become columns.
#if defined(__AVX512F__)
inline __attribute__((always_inline)) void transpose(vi* rows) {
  __m512i *t = (__m512i*)rows, u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) u[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]), u[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // t[i + j], quarter l: rows i to i + 3 of column 4 l + j
    t[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]), t[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    t[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]), t[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i even = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88), odd = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
    __m512i even2 = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88), odd2 = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even, even2, 0x88), t[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88), t[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}
#else
#ifdef __AVX__
#define INTERLEAVE(a, b, high) __builtin_shufflevector(a, b, high, high + 8, high + 1, high + 9, high + 2, high + 10, high + 3, high + 11)
#else
#define INTERLEAVE(a, b, high) __builtin_shufflevector(a, b, high, high + 4, high + 1, high + 5)
#endif

inline __attribute__((always_inline)) void transpose(vi* t) {
#pragma GCC unroll 4
  for (int stage = 1; stage < LANES; stage *= 2) {
    vi u[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      u[2 * i] = INTERLEAVE(t[i], t[i + LANES / 2], 0);
      u[2 * i + 1] = INTERLEAVE(t[i], t[i + LANES / 2], (LANES / 2));
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) t[i] = u[i];
  }
}
#endif

// LANES dwords of `count` weights' rows, zeros where there is nothing, as columns.
template <class X> inline __attribute__((always_inline)) void columns(const X* w, int64_t stride, int count, int inputs, vi* t) {
  if (count >= LANES && inputs >= LANES * Dot<X>::PER) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) {
      memcpy(&t[r], w + r * stride, sizeof(vi));
      __builtin_prefetch(w + (r + LANES) * stride, 0, 2);  // of the next outputs: the processor sees no pattern there
    }
  } else {
    for (int r = 0; r < LANES; r++) {
      t[r] = vi{};
      if (r < count) memcpy(&t[r], w + r * stride, std::min(sizeof(vi), (size_t)inputs * sizeof(X)));
    }
  }
  transpose(t);
}

// The same from weights that lie the other way, [inputs, outputs]: nothing to turn, bf16 rows go in pairs.
template <class X> inline void columns_along(const X* w, int64_t stride, int count, int inputs, vi* t) {
  constexpr int PER = Dot<X>::PER;
  for (int j = 0; j < LANES; j++) {
    X pairs[LANES * PER] = {};
    for (int i = 0; i < PER && j * PER + i < inputs; i++)
      for (int l = 0; l < std::min(LANES, count); l++) pairs[l * PER + i] = w[(j * PER + i) * stride + l];
    memcpy(&t[j], pairs, sizeof(vi));
  }
}

// Where weights lie: an output's inputs side by side, or an input's outputs.
template <class X> struct Matrix {
  const X* at;
  int64_t stride;
  bool along;
  Matrix from(int64_t output, int64_t input) const { return {at + (along ? input * stride + output : output * stride + input), stride, along}; }
  inline __attribute__((always_inline)) void dwords(int count, int inputs, vi* t) const {
    if (along) columns_along(at, stride, count, inputs, t);
    else columns(at, stride, count, inputs, t);
  }
};

// Where sums go, a vector at a time: outputs of row t lie `step` values behind those of row t - 1.
template <class Y> struct Put {
  Y* at;
  int64_t step;
  int count;  // outputs of a row that exist
  Y* row(int t) const { return at + t * step; }
  void ahead(int t) const { fetch(row(t), count); }
  void operator()(int t, int v, vf sum) const { put_some(row(t) + v * LANES, sum, count - v * LANES); }
  static void fetch(const Y* to, int count) {  // into the cache before the products, not behind them
    for (int i = 0; i < count; i += 64 / (int)sizeof(Y)) __builtin_prefetch(to + i, 1, 3);
  }
};

// Up to ROWS rows with vector v of outputs, straight from the weights.
template <class X, int M, class Done> inline void few(const X* const* x, const Matrix<X>& w, int count, int inputs, int v, const Done& done) {
  typedef Dot<X> D;
  typename D::vec a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) a[m] = typename D::vec{};
  for (int k = 0; k < inputs; k += LANES * D::PER) {
    vi t[LANES];
    w.from(0, k).dwords(count, inputs - k, t);
    if (inputs - k >= LANES * D::PER) {
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) a[m] = D::add(a[m], t[j], x[m] + k + j * D::PER);
    } else {
      for (int j = 0; j * D::PER < inputs - k; j++)
        for (int m = 0; m < M; m++) a[m] = D::add(a[m], t[j], x[m] + k + j * D::PER);
    }
  }
  for (int m = 0; m < M; m++) done(m, v, a[m]);
}

// M rows with V vectors of outputs in a panel, added to sums [M][PANEL].
template <class X, int M, int V> inline void tile(const X* const* x, int from, const uint32_t* panel, int dwords, const float* before, float* sums) {
  typedef Dot<X> D;
  typename D::vec a[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) memcpy(&a[m][v], before + m * PANEL + v * LANES, sizeof(vf));
  for (int d = 0; d < dwords; d++) {
    vi w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) w[v] = *(const vi*)(panel + (int64_t)d * PANEL + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) a[m][v] = D::add(a[m][v], w[v], x[m] + from + d * D::PER);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) memcpy(sums + m * PANEL + v * LANES, &a[m][v], sizeof(vf));
}

// Calls f<M> for M rows, 1 to ROWS.
#define FOR_ROWS(rows, CALL) \
  switch (rows) { \
    case 1: CALL(1); break; \
    case 2: CALL(2); break; \
    case 3: CALL(3); break; \
    case 4: CALL(4); break; \
    case 5: CALL((ROWS < 5 ? 1 : 5)); break; \
    default: CALL(ROWS); \
  }

// An odd number of bf16 inputs is read in pairs: such rows are copied, a zero behind them.
template <class X> struct Inputs {
  std::vector<const X*> rows;
  std::vector<X> copy;
  Inputs(const X* x, int64_t count, int64_t step, int inputs) : rows((size_t)count) {
    const int even = (inputs + Dot<X>::PER - 1) / Dot<X>::PER * Dot<X>::PER;
    if (even != inputs) {
      copy.assign((size_t)(count * even), X{});
      for (int64_t t = 0; t < count; t++) std::copy(x + t * step, x + t * step + inputs, copy.begin() + t * even);
      x = copy.data(), step = even;
    }
    for (int64_t t = 0; t < count; t++) rows[(size_t)t] = x + t * step;
  }
};

template <class X> struct Products {  // scratch of one thread, kept from call to call
  Aligned<uint32_t> panel{(size_t)DEPTH * PANEL};
  Aligned<float> sums{(size_t)CHUNK_ROWS * PANEL}, zeros{(size_t)ROWS * PANEL};
  const X* packed = nullptr;  // the weights in the panel
  int64_t packed_from = -1;

  Products() { std::fill(zeros.data, zeros.data + ROWS * PANEL, 0.f); }

  static Products& mine(int which = 0) {
    static thread_local Products all[2];
    all[which].packed = nullptr;  // they may have changed since
    return all[which];
  }

  // Gives `done` the sums of at most CHUNK_ROWS rows and PANEL outputs of weights w, `count` of which exist.
  template <class Done> void run(const X* const* x, int rows, const Matrix<X>& w, int count, int inputs, const Done& done) {
    typedef Dot<X> D;
    const int vectors = (count + LANES - 1) / LANES;
    if (rows <= ROWS) {
      for (int v = 0; v < vectors; v++) {
#define CALL(M) few<X, M>(x, w.from(v * LANES, 0), count - v * LANES, inputs, v, done)
        FOR_ROWS(rows, CALL)
#undef CALL
      }
      return;
    }
    for (int from = 0; !from || from < inputs; from += DEPTH * D::PER) {  // of no inputs the sums are zero
      const int some = std::min(DEPTH * D::PER, inputs - from), dwords = (some + D::PER - 1) / D::PER;
      const bool last = from + some == inputs;
      if (packed != w.at || packed_from != from) {
        packed = w.at, packed_from = from;
        for (int v = 0; v < vectors; v++)
          for (int k = 0; k < some; k += LANES * D::PER) {
            vi t[LANES];
            w.from(v * LANES, from + k).dwords(count - v * LANES, some - k, t);
            for (int j = 0; j < LANES && k / D::PER + j < dwords; j++) *(vi*)(panel.data + (int64_t)(k / D::PER + j) * PANEL + v * LANES) = t[j];
          }
      }
      for (int t = 0; t < rows; t += ROWS) {
        const int some_rows = std::min(ROWS, rows - t);
        for (int m = t + ROWS; m < std::min(t + 2 * ROWS, rows); m++) __builtin_prefetch(x[m] + from), __builtin_prefetch((const char*)(x[m] + from) + 64);
        if (last)
          for (int m = 0; m < some_rows; m++) done.ahead(t + m);
        float* to = sums.data + (last && !from ? 0 : t * PANEL);  // a tile that nothing comes before or after stays near
        const float* before = from ? to : zeros.data;
#define TILE(M, V) tile<X, M, V>(x + t, from, panel.data, dwords, before, to)
#define CALL(M) vectors > VECTORS / 2 ? TILE(M, VECTORS) : vectors > 1 ? TILE(M, VECTORS / 2) : TILE(M, 1)
        FOR_ROWS(some_rows, CALL)
#undef CALL
#undef TILE
        if (last)
          for (int m = 0; m < some_rows; m++)
            for (int v = 0; v < vectors; v++) done(t + m, v, load(to + m * PANEL + v * LANES));
      }
    }
  }
};
}  // namespace
