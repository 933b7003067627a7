// Lightning indexer: scores fused with ReLU, head weights and a streaming top-k (architecture spec 2.6).
//
// I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s]); each row keeps its k best under the total rule: higher score
// first, -0.0 = +0.0, then lower position. Keys are packed in groups of 16: fp32 [group][dim][16], bf16
// [group][dim / 2][16][2], int8 [group][dim / 4][16][4] with 128 added, then the group's 16 scales. A pair's score is
// one chain of sums over dims, then over heads: it does not depend on tile, block or thread. Keys come in ascending
// position, so only scores *above* the k-th best so far enter.
#include "common.h"

namespace {
constexpr int TILE = 32;   // queries that share a pass over the keys
constexpr int NEAR = 256;  // scores among which a threshold is looked for apart

// ------------------------------------------------------------------------- top-k
inline int32_t order(float f) {
  int32_t i;
  memcpy(&i, &f, 4);
  return i < 0 ? i ^ 0x7fffffff : i;
}
inline float unorder(int32_t i) {
  i = i < 0 ? i ^ 0x7fffffff : i;
  float f;
  memcpy(&f, &i, 4);
  return f;
}

int count_at_least(const float* s, int n, float t) {
  int count = 0;
#ifdef __AVX512F__
  __m512 v = _mm512_set1_ps(t);
  int i = 0;
  for (; i + 16 <= n; i += 16) count += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(s + i), v, _CMP_GE_OQ));
  for (; i < n; i++) count += s[i] >= t;
#else
  for (int i = 0; i < n; i++) count += s[i] >= t;
#endif
  return count;
}

// Those of n scores that are at least `low` and not at least `high`, to `out`; returns how many. Reads up to 15 places beyond.
int take(const float* s, int n, float low, float high, float* out) {
  int taken = 0;
#ifdef __AVX512F__
  const __m512 from = _mm512_set1_ps(low), until = _mm512_set1_ps(high);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 there = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    const __m512 x = _mm512_loadu_ps(s + i);
    const __mmask16 in = _mm512_mask_cmp_ps_mask(_mm512_mask_cmp_ps_mask(there, x, from, _CMP_GE_OQ), x, until, _CMP_NGE_UQ);
    _mm512_storeu_ps(out + taken, _mm512_maskz_compress_ps(in, x));
    taken += __builtin_popcount(in);
  }
#else
  for (int i = 0; i < n; i++)
    if (s[i] >= low && !(s[i] >= high)) out[taken++] = s[i];
#endif
  return taken;
}

void range(const float* s, int n, float& low, float& high) {
  low = INFINITY, high = -INFINITY;
  int i = 0;
  vf lowest = splat(INFINITY), highest = splat(-INFINITY);
  for (; i + LANES <= n; i += LANES) {
    vf x = load(s + i);
    lowest = x < lowest ? x : lowest;
    highest = vmax(highest, x);
  }
  for (int l = 0; l < LANES; l++) low = std::min(low, lowest[l]), high = std::max(high, highest[l]);
  for (; i < n; i++) low = std::min(low, s[i]), high = std::max(high, s[i]);
}

struct Candidates {
  float* score;
  int32_t* at;
  int count = 0;
  float threshold = -INFINITY;  // at least k candidates are no worse
};

// Keeps the k best, or up to k + slack of the best: cheaper, and still a superset. Candidates lie in ascending
// position, so of equal scores the first ones are kept.
void keep_best(Candidates& c, int k, int slack) {
  int n = c.count;
  if (n <= k) return;
  float least, most;
  range(c.score, n, least, most);
  // Among the floats in their order (as integers): count(>= low) >= k, count(>= high) < k. Interpolation first,
  // then halves of the value, at last halves of the order, which always ends.
  int64_t low = order(least), high = (int64_t)order(most) + 1;
  int at_low = n, at_high = 0;
  float between[NEAR];  // those in [low, high), as soon as they are few; what lies beyond has been counted
  int few = 0, beyond = 0;
  const auto count_from = [&](int64_t middle) {
    const float t = unorder((int32_t)middle);
    return few ? beyond + count_at_least(between, few, t) : count_at_least(c.score, n, t);
  };
  for (int step = 0; at_low > k + slack && high - low > 1; step++) {
    if (!few && at_low - at_high <= NEAR - GROUP) few = take(c.score, n, unorder((int32_t)low), unorder((int32_t)high), between), beyond = at_high;
    float a = unorder((int32_t)low), b = high > order(INFINITY) ? INFINITY : unorder((int32_t)high);
    float guess = step < 4 ? a + (b - a) * ((float)(at_low - k - slack / 2) / (float)(at_low - at_high)) : a * .5f + b * .5f;
    int64_t middle = step < 24 && std::isfinite(guess) ? order(guess) : (low + high) >> 1;
    if (middle <= low || middle >= high) middle = (low + high) >> 1;
    int found = count_from(middle);
    if (found >= k) low = middle, at_low = found;
    else high = middle, at_high = found;
  }
  if (low == -1) low = 0;  // -0.0 is +0.0
  float threshold = unorder((int32_t)low);
  int equal = n;  // how many scores equal to the threshold stay
  if (at_low > k + slack) equal = k - (low == order(INFINITY) ? 0 : count_from(low + 1));
  int kept = 0;
#ifdef __AVX512F__
  __m512 t = _mm512_set1_ps(threshold);
  for (int i = 0; i < n; i += 16) {  // reads, and compress-stores, up to 15 places beyond
    __mmask16 there = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    __m512 s = _mm512_loadu_ps(c.score + i);
    __m512i at = _mm512_loadu_si512(c.at + i);
    __mmask16 keep = _mm512_mask_cmp_ps_mask(there, s, t, _CMP_GT_OQ), same = _mm512_mask_cmp_ps_mask(there, s, t, _CMP_EQ_OQ);
    int ties = __builtin_popcount(same);
    if (ties > equal) same = (__mmask16)_pdep_u32((1u << equal) - 1, same), ties = equal;
    equal -= ties;
    keep |= same;
    _mm512_storeu_ps(c.score + kept, _mm512_maskz_compress_ps(keep, s));
    _mm512_storeu_si512(c.at + kept, _mm512_maskz_compress_epi32(keep, at));
    kept += __builtin_popcount(keep);
  }
#else
  for (int i = 0; i < n; i++) {
    float s = c.score[i];
    bool same = s == threshold && equal > 0;
    equal -= same;
    c.score[kept] = s;
    c.at[kept] = c.at[i];
    kept += s > threshold || same;
  }
#endif
  c.count = kept;
  c.threshold = threshold;
}

// ------------------------------------------------------------------------- scores
// Some vectors of a block's 64 keys, from number `first` on, for one query, fp32: HEADS heads at a time.
template <int VECTORS, int HEADS>
inline void score_f32(const float* keys, int first, const float* q, const float* w, int heads, int dim, vf* sum) {
  const float* at[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) at[v] = keys + (int64_t)((first + v) / PARTS) * dim * GROUP + (first + v) % PARTS * LANES;
  for (int h = 0; h < heads; h += HEADS) {
    vf dot[HEADS][VECTORS];
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) dot[g][v] = vf{};
    for (int d = 0; d < dim; d++) {
      vf key[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) key[v] = load(at[v] + d * GROUP);
#pragma GCC unroll 4
      for (int g = 0; g < HEADS; g++) {
        vf b = splat(q[(h + g) * dim + d]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) dot[g][v] += key[v] * b;
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; g++) {
      vf weight = splat(w[h + g]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[v] += weight * vmax(dot[g][v], vf{});
    }
  }
}

template <int VECTORS> void vectors_f32(const float* keys, int first, const float* q, const float* w, int heads, int dim, float* out) {
  vf sum[VECTORS] = {};
  constexpr int HEADS = LANES == 4 ? 2 : 4;
  const int whole = heads / HEADS * HEADS;
  score_f32<VECTORS, HEADS>(keys, first, q, w, whole, dim, sum);
  score_f32<VECTORS, 1>(keys, first, q + whole * dim, w + whole, heads - whole, dim, sum);
  for (int v = 0; v < VECTORS; v++) store(out + (first + v) * LANES, sum[v]);
}

void block_f32(const float* keys, const float* q, const float* w, int heads, int dim, float* out) {
  constexpr int ALL = BLOCK / LANES, VECTORS = LANES == 8 ? 3 : 4;  // as many sums as registers hold
  for (int v = 0; v + VECTORS <= ALL; v += VECTORS) vectors_f32<VECTORS>(keys, v, q, w, heads, dim, out);
  if constexpr (ALL % VECTORS != 0) vectors_f32<ALL % VECTORS>(keys, ALL - ALL % VECTORS, q, w, heads, dim, out);
}

#ifdef __AVX512F__
// Puts a block's scores down; which of them lie above the threshold, as bits.
inline uint64_t put_down(const __m512* sum, float threshold, float* out) {
  const __m512 t = _mm512_set1_ps(threshold);
  __mmask16 found[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    _mm512_storeu_ps(out + v * GROUP, sum[v]);
    found[v] = _mm512_cmp_ps_mask(sum[v], t, _CMP_GT_OQ);
  }
  return _mm512_kunpackd(_mm512_kunpackw(found[3], found[2]), _mm512_kunpackw(found[1], found[0]));
}
#endif

#ifdef __AVX512BF16__
// DWORDS: of a key, where the compiler is to know it (0: it is not).
template <int HEADS, int DWORDS>
inline void score_bf16(const uint32_t* keys, const uint32_t* q, const float* w, int heads, int pairs, __m512* sum) {
  if (DWORDS) pairs = DWORDS;
  for (int h = 0; h < heads; h += HEADS) {
    __m512 dot[HEADS][4];
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) dot[g][v] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int d = 0; d < pairs; d++) {
      __m512i key[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) key[v] = _mm512_loadu_si512(keys + (v * pairs + d) * GROUP);
#pragma GCC unroll 8
      for (int g = 0; g < HEADS; g++) {
        __m512i b = _mm512_set1_epi32((int)q[(h + g) * pairs + d]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) dot_pairs(dot[g][v], key[v], b);
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; g++) {
      __m512 weight = _mm512_set1_ps(w[h + g]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) sum[v] = _mm512_fmadd_ps(weight, _mm512_max_ps(dot[g][v], _mm512_setzero_ps()), sum[v]);
    }
  }
}

template <int DWORDS>
uint64_t block_bf16(const uint32_t* keys, const uint32_t* q, const float* w, int heads, int pairs, float threshold, float* out) {
  __m512 sum[4];
  for (int v = 0; v < 4; v++) sum[v] = _mm512_setzero_ps();
  int whole = heads / 4 * 4;
  score_bf16<4, DWORDS>(keys, q, w, whole, pairs, sum);
  score_bf16<1, DWORDS>(keys, q + whole * pairs, w + whole, heads - whole, pairs, sum);
  return put_down(sum, threshold, out);
}
#endif

#ifdef __AVX512VNNI__
template <int HEADS, int DWORDS>
inline void score_int8(const uint32_t* keys, const uint32_t* q, const int32_t* offset, const float* w, int heads, int quads, __m512* sum) {
  if (DWORDS) quads = DWORDS;
  for (int h = 0; h < heads; h += HEADS) {
    __m512i dot[HEADS][4];
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) dot[g][v] = _mm512_set1_epi32(offset[h + g]);
    for (int d = 0; d < quads; d++) {
      __m512i key[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) key[v] = _mm512_loadu_si512(keys + (v * (quads + 1) + d) * GROUP);
#pragma GCC unroll 8
      for (int g = 0; g < HEADS; g++) {
        __m512i b = _mm512_set1_epi32((int)q[(h + g) * quads + d]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) dot_bytes(dot[g][v], key[v], b);
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < HEADS; g++) {
      __m512 weight = _mm512_set1_ps(w[h + g]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++)
        sum[v] = _mm512_fmadd_ps(weight, _mm512_cvtepi32_ps(_mm512_max_epi32(dot[g][v], _mm512_setzero_si512())), sum[v]);
    }
  }
}

template <int DWORDS>
uint64_t block_int8(const uint32_t* keys, const uint32_t* q, const int32_t* offset, const float* w, int heads, int quads, float threshold, float* out) {
  __m512 sum[4];
  for (int v = 0; v < 4; v++) sum[v] = _mm512_setzero_ps();
  int whole = heads / 4 * 4;
  score_int8<4, DWORDS>(keys, q, offset, w, whole, quads, sum);
  score_int8<1, DWORDS>(keys, q + whole * quads, offset + whole, w + whole, heads - whole, quads, sum);
  for (int v = 0; v < 4; v++) sum[v] = _mm512_mul_ps(sum[v], _mm512_castsi512_ps(_mm512_loadu_si512(keys + (v * (quads + 1) + quads) * GROUP)));
  return put_down(sum, threshold, out);
}
#endif

// Which of a block's scores lie above the threshold, as bits.
inline uint64_t above(const float* scores, float threshold) {
  uint64_t found = 0;
#ifdef __AVX512F__
  for (int v = 0; v < 4; v++) found |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(scores + v * 16), _mm512_set1_ps(threshold), _CMP_GT_OQ) << (v * 16);
#else
  for (int v = 0; v < BLOCK; v += LANES) {
    vi higher = load(scores + v) > splat(threshold);
#if defined(__AVX2__)
    found |= (uint64_t)(uint32_t)_mm256_movemask_ps((__m256)higher) << v;
#else
    for (int l = 0; l < LANES; l++) found |= (uint64_t)(higher[l] & 1) << (v + l);
#endif
  }
#endif
  return found;
}

// Takes a block's survivors up, in ascending position. The scores may lie where the candidates end.
inline void push(Candidates& c, const float* scores, uint64_t found, int base) {
#ifdef __AVX512F__
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if (found == ~0ull && scores == c.score + c.count) {
    for (int v = 0; v < 4; v++) _mm512_storeu_si512(c.at + c.count + v * 16, _mm512_add_epi32(_mm512_set1_epi32(base + v * 16), iota));
    c.count += BLOCK;
    return;
  }
  if (__builtin_popcountll(found) > 2) {
    for (int v = 0; v < 4; v++) {
      __mmask16 m = (__mmask16)(found >> (v * 16));
      _mm512_storeu_ps(c.score + c.count, _mm512_maskz_compress_ps(m, _mm512_loadu_ps(scores + v * 16)));
      _mm512_storeu_si512(c.at + c.count, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(_mm512_set1_epi32(base + v * 16), iota)));
      c.count += __builtin_popcount(m);
    }
    return;
  }
#endif
  for (; found; found &= found - 1) {
    int j = __builtin_ctzll(found);
    c.score[c.count] = scores[j];
    c.at[c.count++] = base + j;
  }
}

enum Kind { FLOAT32, BFLOAT16, INT8 };

struct Problem {
  int kind;
  const void* q;  // [T, heads, dim]; dim is a multiple of the dims in a dword
  const float* weights;
  const void* keys;  // packed, block b of request r at page table[r * columns + b]
  const int32_t* table;
  int64_t columns;
  int heads, dim, k;
  int32_t* out;
};

struct Scratch {  // of one thread, kept from call to call: fresh memory costs more than what is done with it
  int capacity = 0;
  Aligned<float> score;
  Aligned<int32_t> at;
  std::vector<float> wide_q;     // where there are no products of bf16 or int8
  Aligned<float> wide_keys;
  std::vector<int32_t> offset;   // int8: minus 128 times the sum of q, per row and head
  alignas(64) float scores[TILE][BLOCK];
  Candidates c[TILE];

  static Scratch& mine(const Problem& p) {
    static thread_local Scratch s;
    s.capacity = p.k + std::max(p.k, 1024) + p.k / 8 + 2 * BLOCK;
    s.score.at_least((size_t)TILE * (s.capacity + 2 * GROUP));
    s.at.at_least((size_t)TILE * (s.capacity + 2 * GROUP));
    if (widens(p.kind)) s.wide_keys.at_least((size_t)BLOCK * p.dim);
    return s;
  }

  void begin(const Problem& p, int64_t first, int rows) {
    for (int i = 0; i < rows; i++) {
      c[i] = Candidates{};
      c[i].score = score.data + (size_t)i * (capacity + 2 * GROUP);
      c[i].at = at.data + (size_t)i * (capacity + 2 * GROUP);
    }
    const int64_t row = (int64_t)p.heads * p.dim;
    if (p.kind == INT8 && VNNI) {
      offset.resize((size_t)(rows * p.heads));
      for (int64_t n = 0; n < rows * p.heads; n++) {
        int32_t sum = 0;
        for (int d = 0; d < p.dim; d++) sum += ((const int8_t*)p.q)[first * row + n * p.dim + d];
        offset[(size_t)n] = -128 * sum;
      }
    } else if (widens(p.kind)) {
      wide_q.resize((size_t)(rows * row));
      for (int64_t i = 0; i < rows * row; i++)
        wide_q[(size_t)i] = p.kind == INT8 ? (float)((const int8_t*)p.q)[first * row + i] : widen(((const uint16_t*)p.q)[first * row + i]);
    }
  }

  // 64 keys as fp32, once for all queries of the tile.
  void widen_keys(const Problem& p, const uint32_t* dwords) {
    const int per = p.kind == INT8 ? 4 : 2, quads = p.dim / per, stride = quads + (p.kind == INT8);
    for (int g = 0; g < BLOCK / GROUP; g++)
      for (int d = 0; d < quads; d++)
        for (int l = 0; l < GROUP; l++) {
          const uint32_t x = dwords[(g * stride + d) * GROUP + l];
          for (int i = 0; i < per; i++)
            wide_keys.data[(g * p.dim + per * d + i) * GROUP + l] = per == 4 ? (float)((int)(x >> 8 * i & 255) - 128) : widen((uint16_t)(x >> 16 * i));
        }
  }

#ifdef __AVX512VNNI__
  static constexpr bool VNNI = true;
#else
  static constexpr bool VNNI = false;
#endif
#ifdef __AVX512BF16__
  static constexpr bool BF16 = true;
#else
  static constexpr bool BF16 = false;
#endif
  static bool widens(int kind) { return (kind == BFLOAT16 && !BF16) || (kind == INT8 && !VNNI); }
};

// Rows first..first + rows of a request, the first at logical position `at`; keys of blocks [from, to).
void pass(const Problem& p, int64_t request, int64_t first, int rows, int64_t at, int64_t from, int64_t to, Scratch& s) {
  const int64_t row = (int64_t)p.heads * p.dim;
  const int dwords = p.kind == FLOAT32 ? p.dim : p.kind == BFLOAT16 ? p.dim / 2 : p.dim / 4 + 1;  // of one packed key
  const bool wide = Scratch::widens(p.kind);
#ifdef __AVX512BF16__
  const auto block_pairs = p.dim == 64 ? block_bf16<32> : p.dim == 128 ? block_bf16<64> : block_bf16<0>;
#endif
#ifdef __AVX512VNNI__
  const auto block_quads = p.dim == 64 ? block_int8<16> : p.dim == 128 ? block_int8<32> : block_int8<0>;
#endif
  const int32_t* pages = p.table + request * p.columns;
  const int ahead = (BLOCK * dwords + rows * 16 - 1) / (rows * 16);  // lines of the next block that each row fetches
  for (int64_t b = from; b < to; b++) {
    const uint32_t* keys = (const uint32_t*)p.keys + (int64_t)pages[b] * BLOCK * dwords;
    const uint32_t* next = (const uint32_t*)p.keys + (int64_t)pages[std::min(b + 1, to - 1)] * BLOCK * dwords;
    if (wide) s.widen_keys(p, keys);
    const int blind = (int)std::max<int64_t>(0, b * BLOCK - at);  // rows that see none of these keys
    uint64_t found[TILE];
    uint32_t any = 0;
    for (int i = blind; i < rows; i++) {
      const float *w = p.weights + (first + i) * p.heads, threshold = s.c[i].threshold;
      float* scores = threshold == -INFINITY ? s.c[i].score + s.c[i].count : s.scores[i];  // where all are taken up, they stay
      for (int l = i * ahead; l < std::min((i + 1) * ahead, BLOCK * dwords / 16); l++) __builtin_prefetch(next + l * 16, 0, 2);
#ifdef __AVX512BF16__
      if (p.kind == BFLOAT16) found[i] = block_pairs(keys, (const uint32_t*)p.q + (first + i) * row / 2, w, p.heads, p.dim / 2, threshold, scores);
      else
#endif
#ifdef __AVX512VNNI__
      if (p.kind == INT8) found[i] = block_quads(keys, (const uint32_t*)p.q + (first + i) * row / 4, s.offset.data() + i * p.heads, w, p.heads, p.dim / 4, threshold, scores);
      else
#endif
      {
        if (wide) block_f32(s.wide_keys.data, s.wide_q.data() + i * row, w, p.heads, p.dim, scores);
        else block_f32((const float*)keys, (const float*)p.q + (first + i) * row, w, p.heads, p.dim, scores);
        if (p.kind == INT8)
          for (int g = 0; g < BLOCK; g++) scores[g] *= ((const float*)keys)[((g / GROUP + 1) * dwords - 1) * GROUP + g % GROUP];
        found[i] = above(scores, threshold);
      }
      const int64_t visible = at + i + 1 - b * BLOCK;
      if (visible < BLOCK) found[i] &= (1ull << visible) - 1;
      any |= (uint32_t)(found[i] != 0) << i;
    }
    for (; any; any &= any - 1) {  // apart from the scoring, whose flow no survivor disturbs
      const int i = __builtin_ctz(any);
      push(s.c[i], s.c[i].threshold == -INFINITY ? s.c[i].score + s.c[i].count : s.scores[i], found[i], (int)(b * BLOCK));
      if (s.c[i].count > s.capacity - BLOCK) keep_best(s.c[i], p.k, p.k / 8);
    }
  }
}

void finish(const Problem& p, Candidates& c, int64_t row) {
  keep_best(c, p.k, 0);
  int32_t* out = p.out + row * p.k;
  memcpy(out, c.at, (size_t)c.count * 4);
  for (int i = c.count; i < p.k; i++) out[i] = -1;
}

}  // namespace

// kind: of queries and keys, 0 fp32, 1 bf16, 2 int8 (weights then hold the queries' scales).
// borders: requests + 1 row numbers. lengths: tokens of each request, its rows being the last ones.
// out int32 [rows, k]: positions ascending, then -1.
EXPORT void nanoglm_select(int kind, const void* q, const float* weights, const void* keys, const int32_t* table, int64_t columns,
                           const int64_t* borders, const int64_t* lengths, int64_t requests, int heads, int dim, int k, int32_t* out,
                           int threads) {
  Problem p{kind, q, weights, keys, table, columns, heads, dim, k, out};
  struct Item { int64_t request, first, at; int rows; };
  std::vector<Item> items;
  for (int64_t r = 0; r < requests; r++)
    for (int64_t first = borders[r]; first < borders[r + 1]; first += TILE)
      items.push_back({r, first, lengths[r] - (borders[r + 1] - first), (int)std::min<int64_t>(TILE, borders[r + 1] - first)});
  if ((int64_t)items.size() >= threads || threads == 1) {
#pragma omp parallel num_threads(threads)
    {
      Scratch& s = Scratch::mine(p);
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = (int64_t)items.size() - 1; n >= 0; n--) {  // the longest first
        const Item& it = items[(size_t)n];
        s.begin(p, it.first, it.rows);
        pass(p, it.request, it.first, it.rows, it.at, 0, (it.at + it.rows + BLOCK - 1) / BLOCK, s);
        for (int i = 0; i < it.rows; i++) finish(p, s.c[i], it.first + i);
      }
    }
    return;
  }
  // Fewer tiles than threads (decoding): the keys are split, each part keeps its k best, parts merge in order.
  for (const Item& it : items) {
    int64_t blocks = (it.at + it.rows + BLOCK - 1) / BLOCK;
    int parts = (int)std::min<int64_t>(threads, std::max<int64_t>(1, blocks / 16));
    std::vector<std::vector<float>> score((size_t)parts * it.rows);
    std::vector<std::vector<int32_t>> at((size_t)parts * it.rows);
#pragma omp parallel num_threads(parts)
    {
      Scratch& s = Scratch::mine(p);
#pragma omp for schedule(static, 1)
      for (int part = 0; part < parts; part++) {
        s.begin(p, it.first, it.rows);
        pass(p, it.request, it.first, it.rows, it.at, blocks * part / parts, blocks * (part + 1) / parts, s);
        for (int i = 0; i < it.rows; i++) {
          keep_best(s.c[i], k, 0);
          score[(size_t)part * it.rows + i].assign(s.c[i].score, s.c[i].score + s.c[i].count);
          at[(size_t)part * it.rows + i].assign(s.c[i].at, s.c[i].at + s.c[i].count);
        }
      }
    }
    std::vector<float> all((size_t)parts * k + GROUP);
    std::vector<int32_t> where((size_t)parts * k + GROUP);
    for (int i = 0; i < it.rows; i++) {
      Candidates c;
      c.score = all.data();
      c.at = where.data();
      for (int part = 0; part < parts; part++) {
        const auto& s = score[(size_t)part * it.rows + i];
        std::copy(s.begin(), s.end(), c.score + c.count);
        const auto& a = at[(size_t)part * it.rows + i];
        std::copy(a.begin(), a.end(), c.at + c.count);
        c.count += (int)s.size();
      }
      finish(p, c, it.first + i);
    }
  }
}
