// Absorbed latent attention over the selected rows only (architecture spec 2.5).
//
// One query row: gather up to 128 selected latents and ropes, scores for all heads, online softmax, weighted
// sum of latents. Sums run over fixed chunks of 128 selected keys in order, so a row's bits depend on its
// Selection alone. Work is split over rows and heads, never over keys.
#include "common.h"

namespace {
constexpr int CHUNK = 128;

struct Problem {
  int bf16;
  const void *q_latent, *q_rope, *latent, *rope;  // [T, H, C], [T, H, R], [N, C], [N, R]
  const int32_t* selection;                        // [T, K] logical positions, -1 after the valid ones
  const int64_t* requests;                         // [T] whose page table, [B, columns], translates them
  const int32_t* table;
  int64_t columns, page_size;
  int64_t count;                                   // T
  int heads, c, r, k;
  float scale;
  void* out;  // [T, H, C]
};

// Storage rows of the first `most` selected positions of row t; returns how many there are.
inline int storage_rows(const Problem& p, int64_t t, int most, int32_t* rows) {
  const int32_t *chosen = p.selection + t * p.k, *pages = p.table + p.requests[t] * p.columns;
  int n = 0;
  if (p.page_size == 64)
    for (; n < most && chosen[n] >= 0; n++) rows[n] = pages[chosen[n] >> 6] * 64 + (chosen[n] & 63);
  else
    for (; n < most && chosen[n] >= 0; n++) rows[n] = (int32_t)(pages[chosen[n] / p.page_size] * p.page_size + chosen[n] % p.page_size);
  return n;
}

inline void to_float(const Problem& p, const void* from, int64_t at, int n, float* to) {
  if (p.bf16) {
    const uint16_t* x = (const uint16_t*)from + at;
    for (int i = 0; i < n; i++) to[i] = widen(x[i]);
  } else {
    memcpy(to, (const float*)from + at, (size_t)n * 4);
  }
}

// Heads [from, to) of one row.
void attend(const Problem& p, int64_t t, int from, int to, int32_t* rows, float* keys, float* values, float* scores, float* q, float* acc) {
  const int wide = p.c + p.r, heads = to - from;
  const int valid = storage_rows(p, t, p.k, rows);
  for (int h = 0; h < heads; h++) {
    to_float(p, p.q_latent, ((t * p.heads) + from + h) * p.c, p.c, q + h * wide);
    to_float(p, p.q_rope, ((t * p.heads) + from + h) * p.r, p.r, q + h * wide + p.c);
    for (int i = 0; i < wide; i++) q[h * wide + i] *= p.scale;
  }
  std::vector<float> top((size_t)heads, -INFINITY), total((size_t)heads, 0.f);
  std::fill(acc, acc + (size_t)heads * p.c, 0.f);
  for (int begin = 0; begin < valid; begin += CHUNK) {
    int n = std::min(CHUNK, valid - begin), groups = (n + GROUP - 1) / GROUP;
    for (int j = 0; j < n; j++) {
      float* v = values + (size_t)j * wide;
      to_float(p, p.latent, (int64_t)rows[begin + j] * p.c, p.c, v);
      to_float(p, p.rope, (int64_t)rows[begin + j] * p.r, p.r, v + p.c);
    }
    for (int j = n; j < groups * GROUP; j++) memset(values + (size_t)j * wide, 0, (size_t)wide * 4);
    for (int g = 0; g < groups; g++)  // transposed: [group][dim][16]
      for (int d = 0; d < wide; d++)
        for (int l = 0; l < GROUP; l++) keys[((size_t)g * wide + d) * GROUP + l] = values[(size_t)(g * GROUP + l) * wide + d];
    for (int g = 0; g < groups; g++)
      for (int h = 0; h < heads; h += 4) {
        int some = std::min(4, heads - h);
        vf dot[4][PARTS] = {};
        const float* k = keys + (size_t)g * wide * GROUP;
        if (some == 4) {
          for (int d = 0; d < wide; d++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
              for (int v = 0; v < PARTS; v++) dot[i][v] += load(k + d * GROUP + v * LANES) * splat(q[(h + i) * wide + d]);
        } else {
          for (int i = 0; i < some; i++)
            for (int d = 0; d < wide; d++)
              for (int v = 0; v < PARTS; v++) dot[i][v] += load(k + d * GROUP + v * LANES) * splat(q[(h + i) * wide + d]);
        }
        for (int i = 0; i < some; i++)
          for (int v = 0; v < PARTS; v++) store(scores + (h + i) * CHUNK + g * GROUP + v * LANES, dot[i][v]);
      }
    for (int h = 0; h < heads; h++) {
      float* s = scores + h * CHUNK;
      for (int j = n; j < groups * GROUP; j++) s[j] = -INFINITY;
      float most = top[(size_t)h];
      for (int j = 0; j < n; j++) most = std::max(most, s[j]);
      vf sum = {};
      for (int j = 0; j < groups * GROUP; j += LANES) {
        vf x = load(s + j);
        vf e = vexp(x - splat(most));
        e = x == splat(-INFINITY) ? vf{} : e;
        store(s + j, e);
        sum += e;
      }
      float added = 0;
      for (int l = 0; l < LANES; l++) added += sum[l];
      float shrink = begin ? std::exp(top[(size_t)h] - most) : 0.f;
      total[(size_t)h] = total[(size_t)h] * shrink + added;
      top[(size_t)h] = most;
      if (begin && shrink != 1.f)
        for (int i = 0; i < p.c; i++) acc[(size_t)h * p.c + i] *= shrink;
    }
    int whole = p.c / LANES * LANES;
    for (int h = 0; h < heads; h++) {
      const float* s = scores + h * CHUNK;
      float* a = acc + (size_t)h * p.c;
      int i = 0;
      for (; i + 4 * LANES <= p.c; i += 4 * LANES) {
        vf sum[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sum[v] = load(a + i + v * LANES);
        for (int j = 0; j < n; j++)
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++) sum[v] += load(values + (size_t)j * wide + i + v * LANES) * splat(s[j]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) store(a + i + v * LANES, sum[v]);
      }
      for (; i < whole; i += LANES) {
        vf sum = load(a + i);
        for (int j = 0; j < n; j++) sum += load(values + (size_t)j * wide + i) * splat(s[j]);
        store(a + i, sum);
      }
      for (; i < p.c; i++)
        for (int j = 0; j < n; j++) a[i] += values[(size_t)j * wide + i] * s[j];
    }
  }
  for (int h = 0; h < heads; h++) {
    float inverse = 1.f / total[(size_t)h];
    int64_t at = ((t * p.heads) + from + h) * p.c;
    for (int i = 0; i < p.c; i++) {
      float x = acc[(size_t)h * p.c + i] * inverse;
      if (p.bf16) ((uint16_t*)p.out)[at + i] = narrow(x);
      else ((float*)p.out)[at + i] = x;
    }
  }
}

#ifdef __AVX512BF16__
// bf16 without transposing keys. Eight heads go together: a key's next four values are broadcast to all lanes
// as two pairs, lane 2h meets head h's first pair and lane 2h + 1 its second, and one addition of neighbours
// at the end gives the score.
constexpr int HEADS = 8, TOGETHER = 16;

inline __m512 vexp512(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.f));
  __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  __m512 n = _mm512_roundscale_ps(t, 8), f = _mm512_sub_ps(t, n);
  __m512 y = _mm512_set1_ps(1.5403530e-4f);  // 2^f on [-1/2, 1/2]
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3333558e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, n);
}

inline void dots(const uint16_t* keys, int64_t wide, const uint32_t* q, int steps, __m512* dot) {
#pragma GCC unroll 16
  for (int j = 0; j < TOGETHER; j++) dot[j] = _mm512_setzero_ps();
  for (int s = 0; s < steps; s++) {
    __m512bh query = (__m512bh)_mm512_load_si512(q + s * 16);
#pragma GCC unroll 16
    for (int j = 0; j < TOGETHER; j++) {
      // As doubles, so that the load broadcasts; as integers gcc goes through a general register.
      __m512d four = _mm512_broadcastsd_pd(_mm_load_sd((const double*)(keys + j * wide + s * 4)));
      dot[j] = _mm512_dpbf16_ps(dot[j], query, (__m512bh)four);
    }
  }
}

inline void copy(const uint16_t* from, int n, uint16_t* to) {  // n is a multiple of 4
  int i = 0;
  for (; i + 32 <= n; i += 32) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  if (i < n) {
    __mmask32 rest = (1u << (n - i)) - 1;
    _mm512_mask_storeu_epi16(to + i, rest, _mm512_maskz_loadu_epi16(rest, from + i));
  }
}

template <int WIDE> inline void weigh(const uint32_t* values, const uint32_t* p, int pairs, int c, float* acc) {
  __m512 a[4][WIDE];
#pragma GCC unroll 4
  for (int h = 0; h < 4; h++)
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; v++) a[h][v] = _mm512_load_ps(acc + h * c + v * 16);
  for (int i = 0; i < pairs; i++) {
    __m512bh x[WIDE];
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; v++) x[v] = (__m512bh)_mm512_load_si512(values + (int64_t)i * c + v * 16);
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
      __m512bh b = (__m512bh)_mm512_set1_epi32((int)p[i * HEADS + h]);
#pragma GCC unroll 4
      for (int v = 0; v < WIDE; v++) a[h][v] = _mm512_dpbf16_ps(a[h][v], x[v], b);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < 4; h++)
#pragma GCC unroll 4
    for (int v = 0; v < WIDE; v++) _mm512_store_ps(acc + h * c + v * 16, a[h][v]);
}

// Heads [from, to) of one row; c is a multiple of 32, r of 4. Scratch: q [groups][(c + r) / 4][16] dwords,
// keys [128][c + r], values [64][c] dwords (pairs of keys), acc [groups * 8][c].
void attend_bf16(const Problem& p, int64_t t, int from, int to, int32_t* rows, uint16_t* keys, uint32_t* q, uint32_t* values, float* acc) {
  const int64_t wide = p.c + p.r;
  const int groups = (to - from + HEADS - 1) / HEADS, steps = (p.c + p.r) / 4;
  const int valid = storage_rows(p, t, p.k, rows);
  memset(q, 0, (size_t)groups * steps * 64);
  for (int h = 0; h < to - from; h++) {
    const uint16_t *a = (const uint16_t*)p.q_latent + (t * p.heads + from + h) * p.c, *b = (const uint16_t*)p.q_rope + (t * p.heads + from + h) * p.r;
    uint32_t* out = q + (size_t)(h / HEADS) * steps * 16 + h % HEADS * 2;
    for (int s = 0; s < p.c / 4; s++) memcpy(out + s * 16, a + s * 4, 8);
    for (int s = 0; s < p.r / 4; s++) memcpy(out + (p.c / 4 + s) * 16, b + s * 4, 8);
  }
  memset(acc, 0, (size_t)groups * HEADS * p.c * 4);
  std::vector<float> state((size_t)groups * 2 * HEADS);  // per group: largest scores, sums of weights
  for (int g = 0; g < groups; g++)
    for (int h = 0; h < HEADS; h++) state[(size_t)(g * 2 * HEADS + h)] = -INFINITY;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  alignas(64) float scores[CHUNK * HEADS];
  alignas(64) uint32_t weights[CHUNK / 2 * HEADS];
  for (int begin = 0; begin < valid; begin += CHUNK) {
    int n = std::min(CHUNK, valid - begin), padded = (n + TOGETHER - 1) / TOGETHER * TOGETHER;
    for (int j = 0; j < padded; j++) {  // behind the last key, that key again: its weight will be zero
      int64_t row = rows[begin + std::min(j, n - 1)];
      copy((const uint16_t*)p.latent + row * p.c, p.c, keys + j * wide);
      copy((const uint16_t*)p.rope + row * p.r, p.r, keys + j * wide + p.c);
    }
    // What comes next: this row's next chunk, or the next row's first.
    int32_t first[CHUNK];
    const int32_t* next = first;
    int ahead = 0;
    if (begin + CHUNK < valid) next = rows + begin + CHUNK, ahead = std::min(CHUNK, valid - begin - CHUNK);
    else if (t + 1 < p.count) ahead = storage_rows(p, t + 1, std::min(CHUNK, p.k), first);
    for (int j = 0; j < ahead; j++) {
      for (int b = 0; b < p.c; b += 32) __builtin_prefetch((const uint16_t*)p.latent + (int64_t)next[j] * p.c + b, 0, 2);
      __builtin_prefetch((const uint16_t*)p.rope + (int64_t)next[j] * p.r, 0, 2);
    }
    for (int i = 0; i < padded / 2; i++)
      for (int b = 0; b < p.c; b += 32) {
        __m512i x = _mm512_loadu_si512(keys + 2 * i * wide + b), y = _mm512_loadu_si512(keys + (2 * i + 1) * wide + b);
        _mm512_store_si512(values + (int64_t)i * p.c + b, _mm512_permutex2var_epi16(x, low, y));
        _mm512_store_si512(values + (int64_t)i * p.c + b + 16, _mm512_permutex2var_epi16(x, high, y));
      }
    for (int g = 0; g < groups; g++) {
      const uint32_t* qg = q + (size_t)g * steps * 16;
      for (int j = 0; j < padded; j += TOGETHER) {
        __m512 dot[TOGETHER];
        dots(keys + j * wide, wide, qg, steps, dot);
#pragma GCC unroll 16
        for (int i = 0; i < TOGETHER; i++) {
          __m512 both = _mm512_add_ps(dot[i], _mm512_permute_ps(dot[i], 0xB1));
          __m256 eight = _mm256_castsi256_ps(_mm512_cvtepi64_epi32(_mm512_castps_si512(both)));
          _mm256_store_ps(scores + (j + i) * HEADS, _mm256_mul_ps(eight, _mm256_set1_ps(p.scale)));
        }
      }
      for (int j = n; j < padded; j++)
        for (int h = 0; h < HEADS; h++) scores[j * HEADS + h] = -INFINITY;
      float *top = state.data() + g * 2 * HEADS, *total = top + HEADS;
      __m512 most = _mm512_load_ps(scores);
      for (int j = 2; j < padded; j += 2) most = _mm512_max_ps(most, _mm512_load_ps(scores + j * HEADS));
      __m256 before = _mm256_loadu_ps(top);
      __m256 now = _mm256_max_ps(before, _mm256_max_ps(_mm512_castps512_ps256(most), _mm512_extractf32x8_ps(most, 1)));
      __m512 both = _mm512_insertf32x8(_mm512_castps256_ps512(now), now, 1), sum = _mm512_setzero_ps();
      for (int i = 0; i < padded / 2; i++) {
        __m512 e = vexp512(_mm512_sub_ps(_mm512_load_ps(scores + i * 16), both));
        e = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_load_ps(scores + i * 16), _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ), e);
        sum = _mm512_add_ps(sum, e);
        __m256i x = (__m256i)_mm512_cvtneps_pbh(e);
        __m128i a = _mm256_castsi256_si128(x), b = _mm256_extracti128_si256(x, 1);
        _mm_store_si128((__m128i*)(weights + i * HEADS), _mm_unpacklo_epi16(a, b));
        _mm_store_si128((__m128i*)(weights + i * HEADS + 4), _mm_unpackhi_epi16(a, b));
      }
      __m256 added = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
      float* out = acc + (size_t)g * HEADS * p.c;
      if (begin) {
        alignas(64) float shrink[16];
        _mm512_store_ps(shrink, vexp512(_mm512_castps256_ps512(_mm256_sub_ps(before, now))));
        _mm256_storeu_ps(total, _mm256_fmadd_ps(_mm256_loadu_ps(total), _mm256_load_ps(shrink), added));
        for (int h = 0; h < HEADS; h++)
          if (shrink[h] != 1.f)
            for (int v = 0; v < p.c; v += 16) _mm512_store_ps(out + h * p.c + v, _mm512_mul_ps(_mm512_load_ps(out + h * p.c + v), _mm512_set1_ps(shrink[h])));
      } else {
        _mm256_storeu_ps(total, added);
      }
      _mm256_storeu_ps(top, now);
      for (int h = 0; h < HEADS; h += 4) {
        if (from + g * HEADS + h >= to) break;
        int v = 0;
        for (; v + 64 <= p.c; v += 64) weigh<4>(values + v, weights + h, padded / 2, p.c, out + h * p.c + v);
        for (; v < p.c; v += 32) weigh<2>(values + v, weights + h, padded / 2, p.c, out + h * p.c + v);
      }
    }
  }
  for (int h = 0; h < to - from; h++) {
    __m512 inverse = _mm512_set1_ps(1.f / state[(size_t)(h / HEADS * 2 * HEADS + HEADS + h % HEADS)]);
    uint16_t* out = (uint16_t*)p.out + (t * p.heads + from + h) * p.c;
    for (int v = 0; v < p.c; v += 16)
      _mm256_storeu_si256((__m256i*)(out + v), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(acc + (size_t)h * p.c + v), inverse)));
  }
}
#endif
}  // namespace

EXPORT void nanoglm_sparse_attention(int bf16, const void* q_latent, const void* q_rope, const void* latent, const void* rope, const int32_t* selection,
                                     const int64_t* requests, const int32_t* table, int64_t columns, int64_t page_size,
                                     int64_t count, int heads, int c, int r, int k, float scale, void* out, int threads) {
  Problem p{bf16, q_latent, q_rope, latent, rope, selection, requests, table, columns, page_size, count, heads, c, r, k, scale, out};
  bool pairs = false;
#ifdef __AVX512BF16__
  pairs = bf16 && c % 32 == 0 && r % 4 == 0;
#endif
  // Rows are plenty in prefill; in decoding their heads are shared out, in whole groups.
  const int whole = pairs ? 8 : 4;
  int parts = count >= threads ? 1 : std::max(1, std::min(threads, heads / whole));
  int each = parts == 1 ? heads : ((heads + parts - 1) / parts + whole - 1) / whole * whole;
  const size_t wide = (size_t)(c + r), padded = (size_t)(heads + 7) / 8 * 8;
#pragma omp parallel num_threads(threads)
  {
    Aligned<int32_t> rows((size_t)k);
    Aligned<float> keys(pairs ? CHUNK * wide / 2 : CHUNK * wide), values(CHUNK / 2 * (pairs ? (size_t)c : 2 * wide)), scores((size_t)heads * CHUNK),
        q(pairs ? padded / 8 * (wide / 4) * 16 : heads * wide), acc(padded * (size_t)c);
#pragma omp for schedule(dynamic, 4)
    for (int64_t n = 0; n < count * parts; n++) {
      int from = (int)(n % parts) * each, to = std::min(heads, from + each);
      if (from >= to) continue;
#ifdef __AVX512BF16__
      if (pairs) {
        attend_bf16(p, n / parts, from, to, rows.data, (uint16_t*)keys.data, (uint32_t*)q.data, (uint32_t*)values.data, acc.data);
        continue;
      }
#endif
      attend(p, n / parts, from, to, rows.data, keys.data, values.data, scores.data, q.data, acc.data);
    }
  }
}
