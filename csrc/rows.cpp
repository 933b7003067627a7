// What is done to each row by itself: the root-mean-square norm, RoPE and the choice of experts (architecture spec
// 2.2, 2.3, 2.9), fp32 inside; its way into a pool of latents or index keys.
#include "common.h"

namespace {
template <class X> void norm_row(const X* row, const X* weight, float eps, int dim, X* y) {
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
  for (; i + LANES <= dim; i += LANES) store(y + i, load(row + i) * scale * load(weight + i));
  for (; i < dim; i++) put(y + i, get(row + i) * scale * get(weight + i));
}

template <class X> void norm(const X* x, int64_t step, const X* weight, float eps, int64_t count, int dim, X* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < count; t++) norm_row(x + t * step, weight, eps, dim, y + t * dim);
}

// Pairs of a row turned, from `from` to `to`.
inline void turn(const float* from, const float* cos, const float* sin, int pairs, float* to) {
  for (int i = 0; i < pairs; i++) {
    const float even = from[2 * i], odd = from[2 * i + 1];
    to[2 * i] = fused(even, cos[i], -(odd * sin[i]));
    to[2 * i + 1] = fused(odd, cos[i], even * sin[i]);
  }
}
inline void turn(const uint16_t* from, const float* cos, const float* sin, int pairs, uint16_t* to) {
  const auto some = [&](int i, size_t bytes) __attribute__((always_inline)) {  // a dword is a pair
    vu x = {};
    vf c = {}, s = {};
    memcpy(&x, from + 2 * i, bytes), memcpy(&c, cos + i, bytes), memcpy(&s, sin + i, bytes);
    const vf even = (vf)(x << 16), odd = (vf)(x & 0xffff0000);
    x = narrowed(fused(even, c, -(odd * s))) >> 16 | (narrowed(fused(odd, c, even * s)) & 0xffff0000);
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

// A key's dwords to their place in a packed pool.
inline void append(const void* key, int64_t slot, int dwords, uint32_t* pool) {
  uint32_t* to = pool + slot / GROUP * dwords * GROUP + slot % GROUP;
  for (int d = 0; d < dwords; d++) memcpy(to + d * GROUP, (const char*)key + 4 * d, 4);
}

template <class X>
void write_latent(const X* kv, int64_t step, const X* weight, float eps, const float* cos, const float* sin, const int64_t* slots, int64_t count, int latent,
                  int rope, X* pool, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < count; t++) {
    X* to = pool + slots[t] * (latent + rope);
    norm_row(kv + t * step, weight, eps, latent, to);
    turn(kv + t * step + latent, cos + t * (rope / 2), sin + t * (rope / 2), rope / 2, to + latent);
  }
}

template <class X>
void write_index_keys(const float* normed, const float* cos, const float* sin, const int64_t* slots, int64_t count, int dim, int rope, bool int8, uint32_t* pool,
                      int threads) {
  constexpr int PER = 4 / sizeof(X);  // values in a dword
  const int whole = (dim + PER - 1) / PER, dwords = int8 ? (dim + 3) / 4 + 1 : whole;
#pragma omp parallel num_threads(threads)
  {
    std::vector<X> row((size_t)(whole * PER));
    std::vector<int8_t> packed((size_t)dwords * 4);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; t++) {
      for (int i = 0; i < dim; i++) put(&row[(size_t)i], normed[t * dim + i]);
      turn(row.data(), cos + t * (rope / 2), sin + t * (rope / 2), rope / 2, row.data());
      if (int8) {
        int8_t* to = packed.data();
        const float scale = quantise_row(row.data(), dim, to);
        for (int i = 0; i < dwords * 4 - 4; i++) to[i] = (int8_t)((i < dim ? to[i] : 0) ^ 0x80);  // 128 more, as unsigned
        memcpy(to + dwords * 4 - 4, &scale, 4);
      }
      append(int8 ? (const void*)packed.data() : row.data(), slots[t], dwords, pool);
    }
  }
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
  for (int64_t t = 0; t < count; t++) append(keys + t * dwords, slots[t], dwords, pool);
}

// Of kv [count, latent + rope], rows `step` values apart, the latents normed by weight [latent] and the rope keys turned by
// cos and sin [count, rope / 2], to these rows of a pool [rows, latent + rope].
EXPORT void nanoglm_write_latent(int bf16, const void* kv, int64_t step, const void* weight, float eps, const float* cos, const float* sin, const int64_t* slots,
                                 int64_t count, int latent, int rope, void* pool, int threads) {
  if (bf16) write_latent((const uint16_t*)kv, step, (const uint16_t*)weight, eps, cos, sin, slots, count, latent, rope, (uint16_t*)pool, threads);
  else write_latent((const float*)kv, step, (const float*)weight, eps, cos, sin, slots, count, latent, rope, (float*)pool, threads);
}

// Index keys [count, dim] after their norm, cast to bf16 if so, their first dims turned by cos and sin [count, rope / 2], to
// these places of a packed pool of that dtype or of int8.
EXPORT void nanoglm_write_index_keys(int bf16, const float* normed, const float* cos, const float* sin, const int64_t* slots, int64_t count, int dim, int rope,
                                     int int8, uint32_t* pool, int threads) {
  if (bf16) write_index_keys<uint16_t>(normed, cos, sin, slots, count, dim, rope, int8, pool, threads);
  else write_index_keys<float>(normed, cos, sin, slots, count, dim, rope, int8, pool, threads);
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
