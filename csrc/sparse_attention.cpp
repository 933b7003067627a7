// Absorbed latent attention over the selected rows only (architecture spec 2.5).
//
// One query row: gather a chunk of selected latents and ropes, scores for all heads, online softmax, weighted
// sum of latents. Sums run over fixed chunks of 64 selected keys (of bf16 pairs 128) in order, so a row's bits depend on
// its Selection alone. Work is split over rows and heads, never over keys.
#include "selected.h"

namespace {
constexpr int CHUNK = 64, TOGETHER = 16, AHEAD = 48;  // keys: of a sum, of one pass over the queries, fetched ahead

struct Problem : Selected {
  int bf16;
  const void *q_latent, *q_rope, *latent, *rope;  // [T, H, C], [T, H, R], [N, C], [N, R]
  int64_t latent_step, rope_step;                 // values from one storage row to the next
  int heads, c, r;
  float scale;
  void* out;  // [T, H, C]
};

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
      to_float(p, p.latent, rows[begin + j] * p.latent_step, p.c, v);
      to_float(p, p.rope, rows[begin + j] * p.rope_step, p.r, v + p.c);
    }
    turn(values, n, wide, keys);
    for (int g = 0; g < groups; g++) products(keys + (size_t)g * wide * GROUP, q, heads, wide, wide, scores + g * GROUP, CHUNK);
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
// bf16 without transposing keys. Eight heads go together, and their products with a key are made of what is broadcast
// of it: with many heads its next four values to all lanes, as two pairs, of which lane 2h meets head h's first and
// lane 2h + 1 its second; with few its next eight to all quarters, which meet the first and the second of two heads.
constexpr int HEADS = 8, KEYS = 8;   // whose scores are made together
constexpr int PAIRED_CHUNK = 128;    // keys of a sum

inline __m512 exp2_512(__m512 x) {  // relative error below 3e-7; a denormal or 0 below -126
  x = _mm512_max_ps(x, _mm512_set1_ps(-200.f));
  __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(1.3333558e-3f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, n);
}

struct Scratch {  // of one thread, for groups of eight heads
  int64_t wide;   // of a key's row in scratch; the usual one is known to the compiler
  Aligned<uint16_t> key_rows;
  Aligned<uint32_t> queries, weight_pairs;
  Aligned<float> floats;
  uint16_t* keys;               // [2][PAIRED_CHUNK][wide]
  uint32_t *q, *weights;        // [groups][(c + r) / 4][16], [groups][PAIRED_CHUNK / 2][8]
  float *scores, *state, *acc;  // [groups][PAIRED_CHUNK][8], [groups][2][16] (largest scores, sums of weights), [groups * 8][c]
  Scratch(const Problem& p, size_t groups)
      : wide((p.c + p.r + 31) / 32 * 32), key_rows(2 * PAIRED_CHUNK * wide), queries(groups * ((p.c + p.r) / 4) * 16),
        weight_pairs(groups * PAIRED_CHUNK / 2 * HEADS), floats(groups * (PAIRED_CHUNK * HEADS + 32 + (size_t)HEADS * p.c)), keys(key_rows.data),
        q(queries.data), weights(weight_pairs.data), scores(floats.data), state(scores + groups * PAIRED_CHUNK * HEADS), acc(state + groups * 32) {}
};

// Storage rows of row t's keys; behind them its last one again, to a multiple of 16 (of weight zero), and the first of
// the next row. Returns how many its own are, and in `end` where the next row's begin.
inline int rows_and_next(const Problem& p, int64_t t, int32_t* rows, int& end) {
  const int valid = storage_rows(p, t, p.k, rows);
  if (!valid) rows[0] = 0;  // not a Selection; nothing to read beyond it
  for (end = valid; end % TOGETHER; end++) rows[end] = rows[valid - 1];
  const int more = t + 1 < p.count ? storage_rows(p, t + 1, std::min(p.k, AHEAD), rows + end) : 0;
  for (int i = more; i < AHEAD; i++) rows[end + i] = rows[0];
  return valid;
}

// Where head h of eight lies in a vector of scores, which holds two keys: in each quarter two heads of the one, then of
// the other.
constexpr int lane(int h) { return h / 2 * 4 + h % 2; }

// The online softmax of eight heads over the next n keys: scores become weights, as pairs of bf16 by keys.
inline void soften(float* score, int n, int padded, bool first, uint32_t* weights, float* state, float* acc, int64_t c) {
  const __m512i by_head = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int j = n; j < padded; j++)
    for (int l = 0; l < 16; l++)
      if (l % 4 / 2 == j % 2) score[j / 2 * 16 + l] = -INFINITY;
  __m512 most = _mm512_load_ps(score);
  for (int i = 1; i < padded / 2; i++) most = _mm512_max_ps(most, _mm512_load_ps(score + i * 16));
  most = _mm512_max_ps(most, _mm512_permute_ps(most, 0x4E));  // of both keys
  if (!first) most = _mm512_max_ps(most, _mm512_load_ps(state));
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < padded / 2; i += 2) {
    const __m512 a = exp2_512(_mm512_sub_ps(_mm512_load_ps(score + i * 16), most));
    const __m512 b = exp2_512(_mm512_sub_ps(_mm512_load_ps(score + i * 16 + 16), most));
    sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
    _mm512_store_si512(weights + i * HEADS, _mm512_shuffle_epi8((__m512i)_mm512_cvtne2ps_pbh(b, a), by_head));
  }
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
  if (!first) {
    alignas(64) float shrink[16];
    const __m512 less = exp2_512(_mm512_sub_ps(_mm512_load_ps(state), most));
    _mm512_store_ps(shrink, less);
    sum = _mm512_fmadd_ps(_mm512_load_ps(state + 16), less, sum);
    for (int h = 0; h < HEADS; h++)
      if (const float f = shrink[lane(h)]; f != 1.f)
        for (float* a = acc + h * c; a < acc + (h + 1) * c; a += 16) _mm512_store_ps(a, _mm512_mul_ps(_mm512_load_ps(a), _mm512_set1_ps(f)));
  }
  _mm512_store_ps(state, most);
  _mm512_store_ps(state + 16, sum);
}

// Pairs of values' rows side by side, 32 values of each. Unpacking leaves them in another order (low: values 0-3,
// 8-11, ...; high: 4-7, ...), which lasts until the row is finished.
struct Unpacking {
  const uint16_t* const* rows;
  int64_t at;
  __m512i operator()(int pair, bool high) const {
    __m512i x = _mm512_loadu_si512(rows[2 * pair] + at), y = _mm512_loadu_si512(rows[2 * pair + 1] + at);
    return high ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y);
  }
};
struct Unpacked {
  const __m512i* pairs;
  __m512i operator()(int pair, bool high) const { return pairs[2 * pair + high]; }
};

// acc[h][32 values] += p[h][key] * value[key] for eight heads, keys in pairs.
template <class Values> inline void weigh(const Values& value, const uint32_t* p, int pairs, int64_t c, float* acc) {
  __m512 a[HEADS][2];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++) a[h][0] = _mm512_load_ps(acc + h * c), a[h][1] = _mm512_load_ps(acc + h * c + 16);
  for (int i = 0; i < pairs; i++) {
    __m512bh low = (__m512bh)value(i, false), high = (__m512bh)value(i, true);
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) {
      __m512bh b = (__m512bh)_mm512_set1_epi32((int)p[i * HEADS + h]);
      a[h][0] = _mm512_dpbf16_ps(a[h][0], low, b);
      a[h][1] = _mm512_dpbf16_ps(a[h][1], high, b);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; h++) _mm512_store_ps(acc + h * c, a[h][0]), _mm512_store_ps(acc + h * c + 16, a[h][1]);
}

// Sums over weights become the output of heads [from, to).
inline void finish(const Problem& p, int64_t t, int from, int to, const Scratch& s) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int h = 0; h < to - from; h++) {
    __m512 inverse = _mm512_set1_ps(1.f / s.state[h / HEADS * 32 + 16 + lane(h % HEADS)]);
    uint16_t* out = (uint16_t*)p.out + (t * p.heads + from + h) * p.c;
    for (int v = 0; v < p.c; v += 32) {
      __m512 x = _mm512_mul_ps(_mm512_load_ps(s.acc + (size_t)h * p.c + v), inverse);
      __m512 y = _mm512_mul_ps(_mm512_load_ps(s.acc + (size_t)h * p.c + v + 16), inverse);
      __m512bh both = _mm512_cvtne2ps_pbh(_mm512_permutex2var_ps(x, high, y), _mm512_permutex2var_ps(x, low, y));
      _mm512_storeu_si512(out + v, (__m512i)both);
    }
  }
}

// Up to eight heads of one row; c is a multiple of 32, r of 8. Keys are read where they lie, each by one group of heads.
// ALONG: a key's rope lies behind its latent.
template <int C, int R, bool ALONG> void attend_few(const Problem& p, int64_t t, int from, int to, int32_t* rows, const Scratch& s) {
  const int64_t c = C ? C : p.c, r = R ? R : p.r, latent_step = p.latent_step, rope_step = p.rope_step;
  const uint16_t *latent = (const uint16_t*)p.latent, *rope = (const uint16_t*)p.rope;
  constexpr int VALUES = 8;  // of a key in one step
  const int steps = (int)(c + r) / VALUES;
  memset(s.q, 0, (size_t)steps * 128);
  for (int h = 0; h < to - from; h++) {
    const uint16_t *a = (const uint16_t*)p.q_latent + (t * p.heads + from + h) * c, *b = (const uint16_t*)p.q_rope + (t * p.heads + from + h) * r;
    uint32_t* out = s.q + h % 2 * steps * 16 + h / 2 * 4;
    for (int i = 0; i < c / VALUES; i++) memcpy(out + i * 16, a + i * VALUES, VALUES * 2);
    for (int i = 0; i < r / VALUES; i++) memcpy(out + (c / VALUES + i) * 16, b + i * VALUES, VALUES * 2);
  }
  memset(s.acc, 0, (size_t)HEADS * c * 4);
  const __m512 scale = _mm512_set1_ps(p.scale * 1.44269504f);  // scores are powers of two from here on
  int end;
  const int valid = rows_and_next(p, t, rows, end);
  const uint16_t* at[PAIRED_CHUNK + AHEAD];  // latents of this chunk's keys and of those behind them
  for (int i = 0; i < AHEAD; i++) at[i] = latent + rows[i] * latent_step;
  for (int begin = 0; begin < valid; begin += PAIRED_CHUNK) {
    const int n = std::min(PAIRED_CHUNK, valid - begin), padded = std::min(PAIRED_CHUNK, end - begin);
    for (int j = 0; j < padded; j += KEYS) {
      const int32_t* now = rows + begin + j;
      const uint16_t *key[KEYS], **later = at + j + AHEAD;
      __m512 dot[2][KEYS];  // with the first and the second of two heads
#pragma GCC unroll 8
      for (int i = 0; i < KEYS; i++) {
        key[i] = at[j + i];
        later[i] = latent + now[AHEAD + i] * latent_step;
        dot[0][i] = dot[1][i] = _mm512_setzero_ps();
      }
      const uint32_t* q = s.q;
      // Over values of the keys; while products run, 32 values of one later key after the other are fetched.
      const auto add = [&](int64_t values, auto fetch) __attribute__((always_inline)) {
        for (int64_t v = 0; v < values; v += 32)
#pragma GCC unroll 4
          for (int i = 0; i < 32 / VALUES; i++) {
            if (v + i * VALUES < values) {
              const __m512bh first = (__m512bh)_mm512_load_si512(q), second = (__m512bh)_mm512_load_si512(q + steps * 16);
              q += 16;
#pragma GCC unroll 8
              for (int l = 0; l < KEYS; l++) {  // as floats, so that the load broadcasts
                const __m512bh x = (__m512bh)_mm512_broadcast_f32x4(_mm_loadu_ps((const float*)(key[l] + v + i * VALUES)));
                dot[0][l] = _mm512_dpbf16_ps(dot[0][l], first, x);
                dot[1][l] = _mm512_dpbf16_ps(dot[1][l], second, x);
              }
            }
            fetch(2 * i, v), fetch(2 * i + 1, v);
          }
      };
      add(ALONG ? c + r : c, [&](int i, int64_t v) { __builtin_prefetch(later[i] + v, 0, 3); });
      if (!ALONG) {
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; i++) key[i] = rope + now[i] * rope_step;
        add(r, [&](int i, int64_t v) { __builtin_prefetch(rope + now[AHEAD + i] * rope_step + v, 0, 3); });
      }
      const auto half = [&](int i) {
        return _mm512_add_ps(_mm512_unpacklo_ps(dot[0][i], dot[1][i]), _mm512_unpackhi_ps(dot[0][i], dot[1][i]));
      };
#pragma GCC unroll 4
      for (int i = 0; i < KEYS; i += 2) {
        const __m512 x = half(i), y = half(i + 1);
        const __m512 two = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xEE));
        _mm512_store_ps(s.scores + (j + i) * HEADS, _mm512_mul_ps(two, scale));
      }
    }
    soften(s.scores, n, padded, !begin, s.weights, s.state, s.acc, c);
    for (int v = 0; v < c; v += 32) weigh(Unpacking{at, v}, s.weights, padded / 2, c, s.acc + v);
    std::copy(at + padded, at + padded + AHEAD, at);
  }
  finish(p, t, from, to, s);
}

// Keys' rows on their way from the cache to a thread's own: `next` holds storage rows that are copied, `later`
// others that are fetched, 32 values of some of 16 rows at a time.
struct Moving {
  const uint16_t *latent, *rope;
  int64_t latent_step, rope_step, c, r;
  const int32_t *next, *later;
  uint16_t* to;  // [16][stride]
  int from, until;  // pairs of rows whose turn it is
  struct Part {
    const uint16_t* from;
    int64_t stride, at;
    __mmask32 there;
  };
  Part part(int64_t at) const {  // of values [at, at + 32) of latent and rope
    if (at < c) return {latent + at, latent_step, at, ~0u};
    return {rope + at - c, rope_step, at, c + r - at >= 32 ? ~0u : (1u << (c + r - at)) - 1};
  }
  void two(const Part& p, int i, int64_t wide) const {
#pragma GCC unroll 2
    for (int j = i; j < i + 2; j++) {
      const uint16_t* from = p.from + next[j] * p.stride;
      _mm512_storeu_si512(to + j * wide + p.at, p.there == ~0u ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(p.there, from));
      __builtin_prefetch(p.from + later[j] * p.stride, 0, 3);
    }
  }
  void all(int64_t wide) const {
    for (int64_t at = 0; at < c + r; at += 32)
      for (int i = 0; i < TOGETHER; i += 2) two(part(at), i, wide);
  }
};

// Products of GROUPS groups of eight heads with COUNT keys, [GROUPS][COUNT]; while they run, the rows of other keys are
// moved, of which each call has its share. Two groups share the loads of the keys.
template <int GROUPS, int COUNT>
inline __attribute__((always_inline)) void dots(const uint16_t* keys, int64_t wide, int steps, const uint32_t* q, __m512* dot, const Moving& moving) {
  constexpr int VALUES = 4, STEPS = 32 / VALUES;
#pragma GCC unroll 16
  for (int j = 0; j < GROUPS * COUNT; j++) dot[j] = _mm512_setzero_ps();
  for (int first = 0; first < steps; first += STEPS) {
    const Moving::Part part = moving.part(first * VALUES);
    for (int i = 0; i < STEPS; i++) {
      if (first + i < steps) {
        __m512bh query[GROUPS];
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++) query[g] = (__m512bh)_mm512_load_si512(q + (g * steps + first + i) * 16);
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; j++) {  // as doubles, so that the load broadcasts; as integers gcc goes through a general register
          const __m512bh key = (__m512bh)_mm512_broadcastsd_pd(_mm_load_sd((const double*)(keys + j * wide + (first + i) * VALUES)));
#pragma GCC unroll 2
          for (int g = 0; g < GROUPS; g++) dot[g * COUNT + j] = _mm512_dpbf16_ps(dot[g * COUNT + j], query[g], key);
        }
      }
      if (int pair = moving.from + i; pair < moving.until) moving.two(part, 2 * pair, wide);
    }
  }
}

// Puts the scores of one group of eight heads down, scaled; `dot` holds two sums for each, to be added.
template <int COUNT> inline void put_scores(const __m512* dot, __m512 scale, float* scores) {
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; i += 2) {
    __m512 two = _mm512_add_ps(_mm512_shuffle_ps(dot[i], dot[i + 1], 0x88), _mm512_shuffle_ps(dot[i], dot[i + 1], 0xDD));
    _mm512_store_ps(scores + i * HEADS, _mm512_mul_ps(two, scale));
  }
}

// Heads [from, to) of one row; c is a multiple of 32, r of 4. Keys are copied, for each is read by all groups of heads.
template <int WIDE> void attend_many(const Problem& p, int64_t t, int from, int to, int32_t* rows, const Scratch& s) {
  const int64_t wide = WIDE ? WIDE : s.wide, c = p.c, r = p.r;
  constexpr int VALUES = 4;  // of a key in one step
  const int groups = (to - from + HEADS - 1) / HEADS, steps = (int)(c + r) / VALUES;
  memset(s.q, 0, (size_t)groups * steps * 64);
  for (int h = 0; h < to - from; h++) {
    const uint16_t *a = (const uint16_t*)p.q_latent + (t * p.heads + from + h) * c, *b = (const uint16_t*)p.q_rope + (t * p.heads + from + h) * r;
    uint32_t* out = s.q + (size_t)(h / HEADS) * steps * 16 + h % HEADS * 2;
    for (int i = 0; i < c / VALUES; i++) memcpy(out + i * 16, a + i * VALUES, VALUES * 2);
    for (int i = 0; i < r / VALUES; i++) memcpy(out + (c / VALUES + i) * 16, b + i * VALUES, VALUES * 2);
  }
  memset(s.acc, 0, (size_t)groups * HEADS * c * 4);
  const __m512 scale = _mm512_set1_ps(p.scale * 1.44269504f);  // scores are powers of two from here on
  int end;
  const int valid = rows_and_next(p, t, rows, end);
  Moving moving{(const uint16_t*)p.latent, (const uint16_t*)p.rope, p.latent_step, p.rope_step, c, r, rows, rows, s.keys, 0, 0};
  const int moved = (TOGETHER / 2 + groups - 1) / groups;  // pairs a turn; there are as many turns as groups
  moving.all(wide);
  for (int begin = 0; begin < valid; begin += PAIRED_CHUNK) {
    const int n = std::min(PAIRED_CHUNK, valid - begin), padded = std::min(PAIRED_CHUNK, end - begin);
    uint16_t* keys = s.keys + begin / PAIRED_CHUNK % 2 * PAIRED_CHUNK * wide;  // of two chunks in turn
    const uint16_t* at[PAIRED_CHUNK];
    for (int j = 0; j < padded; j++) at[j] = keys + j * wide;
    for (int j = 0; j < padded; j += TOGETHER) {
      moving.next = rows + begin + j + TOGETHER;
      moving.later = rows + std::min(begin + j + AHEAD, end + AHEAD - TOGETHER);
      moving.to = s.keys + (begin + j + TOGETHER) % (2 * PAIRED_CHUNK) * wide;
      const uint16_t* k = keys + j * wide;
      float* scores = s.scores + j * HEADS;
      auto turn = [&] { moving.from = moving.until, moving.until = std::min(moving.until + moved, TOGETHER / 2); };
      moving.until = 0;
      int g = 0;
      for (; g + 2 <= groups; g += 2)
        for (int half = 0; half < TOGETHER; half += KEYS) {
          __m512 dot[2 * KEYS];
          turn();
          dots<2, KEYS>(k + half * wide, wide, steps, s.q + (size_t)g * steps * 16, dot, moving);
          put_scores<KEYS>(dot, scale, scores + (g * PAIRED_CHUNK + half) * HEADS);
          put_scores<KEYS>(dot + KEYS, scale, scores + ((g + 1) * PAIRED_CHUNK + half) * HEADS);
        }
      if (g < groups) {
        __m512 dot[TOGETHER];
        turn();
        dots<1, TOGETHER>(k, wide, steps, s.q + (size_t)g * steps * 16, dot, moving);
        put_scores<TOGETHER>(dot, scale, scores + g * PAIRED_CHUNK * HEADS);
      }
    }
    for (int g = 0; g < groups; g++)
      soften(s.scores + g * PAIRED_CHUNK * HEADS, n, padded, !begin, s.weights + g * PAIRED_CHUNK / 2 * HEADS, s.state + g * 32, s.acc + (int64_t)g * HEADS * c, c);
    for (int v = 0; v < c; v += 32) {
      const Unpacking values{at, v};
      __m512i pairs[PAIRED_CHUNK];
      for (int i = 0; i < padded / 2; i++) pairs[2 * i] = values(i, false), pairs[2 * i + 1] = values(i, true);
      for (int g = 0; g < groups; g++) weigh(Unpacked{pairs}, s.weights + g * PAIRED_CHUNK / 2 * HEADS, padded / 2, c, s.acc + (int64_t)g * HEADS * c + v);
    }
  }
  finish(p, t, from, to, s);
}
#endif
}  // namespace

EXPORT void nanoglm_sparse_attention(int bf16, const void* q_latent, const void* q_rope, const void* latent, int64_t latent_step, const void* rope,
                                     int64_t rope_step, const int32_t* selection, const int64_t* requests, const int32_t* table, int64_t columns, int64_t page_size,
                                     int64_t count, int heads, int c, int r, int k, float scale, void* out, int threads) {
  Problem p{{selection, requests, table, columns, page_size, count, k, {}}, bf16, q_latent, q_rope, latent, rope, latent_step, rope_step, heads, c, r, scale, out};
  p.run = runs(p);
  bool pairs = false;
#ifdef __AVX512BF16__
  pairs = bf16 && c % 32 == 0 && r % 4 == 0;
#endif
  // Rows are plenty in prefill; in decoding their heads are shared out, in whole groups.
  const int whole = pairs ? 8 : 4;
  int parts = count >= threads ? 1 : std::max(1, std::min(threads, heads / whole));
  int each = parts == 1 ? heads : ((heads + parts - 1) / parts + whole - 1) / whole * whole;
#pragma omp parallel num_threads(threads)
  {
    Aligned<int32_t> rows((size_t)k + TOGETHER + AHEAD);
#ifdef __AVX512BF16__
    if (pairs) {
      const bool many = heads > HEADS || r % 8;  // heads of the model: bits may not depend on how they are shared out
      const bool along = rope_step == latent_step && rope == (const uint16_t*)latent + c;
      Scratch s(p, (size_t)(heads + HEADS - 1) / HEADS);
      const auto of_few = !along ? attend_few<0, 0, false> : c == 64 && r == 32 ? attend_few<64, 32, true> : attend_few<0, 0, true>;
      const auto attend_one = !many ? of_few : s.wide == 576 ? attend_many<576> : attend_many<0>;
#pragma omp for schedule(dynamic, 4)
      for (int64_t n = 0; n < count * parts; n++)
        if (int from = (int)(n % parts) * each, to = std::min(heads, from + each); from < to) attend_one(p, n / parts, from, to, rows.data, s);
    } else
#endif
    {
      const size_t wide = (size_t)(c + r);
      Aligned<float> keys(CHUNK * wide), values(CHUNK * wide), scores((size_t)heads * CHUNK), q(heads * wide), acc((size_t)heads * c);
#pragma omp for schedule(dynamic, 4)
      for (int64_t n = 0; n < count * parts; n++)
        if (int from = (int)(n % parts) * each, to = std::min(heads, from + each); from < to)
          attend(p, n / parts, from, to, rows.data, keys.data, values.data, scores.data, q.data, acc.data);
    }
  }
}
