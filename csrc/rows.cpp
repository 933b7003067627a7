// What is done to each row by itself: the root-mean-square norm, RoPE and the choice of experts (architecture spec
// 2.2, 2.3, 2.9), fp32 inside; its way into a pool of index keys.
#include "common.h"

namespace {
template <class X> void norm(const X* x, int64_t step, const X* weight, float eps, int64_t count, int dim, X* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < count; t++) {
    const X* row = x + t * step;
    vf lanes[PARTS] = {};  // sixteen sums, whatever a vector holds
    float sum = 0;
    int d = 0;
    for (; d + GROUP <= dim; d += GROUP)
      for (int part = 0; part < PARTS; part++) {
        const vf v = load(row + d + part * LANES);
        lanes[part] += v * v;
      }
    for (int l = 0; d + l < dim; l++) lanes[l / LANES][l % LANES] = std::fma(get(row + d + l), get(row + d + l), lanes[l / LANES][l % LANES]);
    for (int l = 0; l < GROUP; l++) sum += lanes[l / LANES][l % LANES];
    const float scale = 1.f / std::sqrt(sum / (float)dim + eps);
    int i = 0;
    for (; i + LANES <= dim; i += LANES) store(y + t * dim + i, load(row + i) * scale * load(weight + i));
    for (; i < dim; i++) put(y + t * dim + i, get(row + i) * scale * get(weight + i));
  }
}

// Pairs of a row turned, from `from` to `to`.
inline void turn(const float* from, const float* cos, const float* sin, int pairs, float* to) {
  for (int i = 0; i < pairs; i++) {
    const float even = from[2 * i], odd = from[2 * i + 1];
    to[2 * i] = even * cos[i] - odd * sin[i];
    to[2 * i + 1] = odd * cos[i] + even * sin[i];
  }
}
inline void turn(const uint16_t* from, const float* cos, const float* sin, int pairs, uint16_t* to) {
  const auto some = [&](int i, size_t bytes) __attribute__((always_inline)) {  // a dword is a pair
    vu x = {};
    vf c = {}, s = {};
    memcpy(&x, from + 2 * i, bytes), memcpy(&c, cos + i, bytes), memcpy(&s, sin + i, bytes);
    const vf even = (vf)(x << 16), odd = (vf)(x & 0xffff0000);
    x = narrowed(even * c - odd * s) >> 16 | (narrowed(odd * c + even * s) & 0xffff0000);
    memcpy(to + 2 * i, &x, bytes);
  };
  int i = 0;
  for (; i + LANES <= pairs; i += LANES) some(i, sizeof(vf));
  if (i < pairs) some(i, (size_t)(pairs - i) * 4);
}

template <class X>
void rotate(const X* x, int64_t step, int64_t head_step, const float* cos, const float* sin, int64_t count, int heads, int dim, int turned, X* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < count; t++)
    for (int h = 0; h < heads; h++) {
      const X* from = x + t * step + h * head_step;
      X* to = y + (t * heads + h) * dim;
      turn(from, cos + t * (turned / 2), sin + t * (turned / 2), turned / 2, to);
      if (to != from) std::copy(from + turned, from + dim, to + turned);
    }
}

template <class X> void quantise(const X* x, int64_t count, int dim, int8_t* y, float* scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < count; t++) scales[t] = quantise_row(x + t * dim, dim, y + t * dim);
}
}  // namespace

// x [count, dim] -> int8 [count, dim] and scales [count], the largest value of a row becoming 127.
EXPORT void nanoglm_quantise(int bf16, const void* x, int64_t count, int dim, int8_t* y, float* scales, int threads) {
  if (bf16) quantise((const uint16_t*)x, count, dim, y, scales, threads);
  else quantise((const float*)x, count, dim, y, scales, threads);
}

// Keys [count, dwords] to these places of a packed pool, [groups, dwords, 16].
EXPORT void nanoglm_append(const uint32_t* keys, const int64_t* slots, int64_t count, int dwords, uint32_t* pool, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < count; t++) {
    uint32_t* to = pool + slots[t] / GROUP * dwords * GROUP + slots[t] % GROUP;
    for (int d = 0; d < dwords; d++) to[d * GROUP] = keys[t * dwords + d];
  }
}

// x [count, dim] with rows `step` values apart, weight [dim], y [count, dim].
EXPORT void nanoglm_rms_norm(int bf16, const void* x, int64_t step, const void* weight, float eps, int64_t count, int dim, void* y, int threads) {
  if (bf16) norm((const uint16_t*)x, step, (const uint16_t*)weight, eps, count, dim, (uint16_t*)y, threads);
  else norm((const float*)x, step, (const float*)weight, eps, count, dim, (float*)y, threads);
}

// x [count, heads, dim] with these strides, whose first `turned` dims are turned; cos and sin [count, turned / 2],
// y [count, heads, dim]: x itself, if that has no gaps, or apart from it.
EXPORT void nanoglm_rotate(int bf16, const void* x, int64_t step, int64_t head_step, const float* cos, const float* sin, int64_t count, int heads, int dim, int turned,
                           void* y, int threads) {
  if (bf16) rotate((const uint16_t*)x, step, head_step, cos, sin, count, heads, dim, turned, (uint16_t*)y, threads);
  else rotate((const float*)x, step, head_step, cos, sin, count, heads, dim, turned, (float*)y, threads);
}

// out [count, k]: places of the k largest of n scores, best first; of equal ones (-0.0 = +0.0) the first.
EXPORT void nanoglm_top(const float* scores, int64_t count, int n, int k, int64_t* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < count; t++) {
    const float* s = scores + t * n;
    int64_t* best = out + t * k;
    for (int i = 0, held = 0; i < n; i++) {
      if (held == k && !(s[i] > s[best[k - 1]])) continue;
      int at = held < k ? held++ : k - 1;
      for (; at > 0 && s[i] > s[best[at - 1]]; at--) best[at] = best[at - 1];
      best[at] = i;
    }
  }
}
