// What all kernels share: vectors of the widest kind this translation unit may use, bf16, the exported names.
//
// Every source is compiled once per instruction set (-DNANOGLM_ISA=...). fp32 arithmetic is written once, in
// gcc's vector extensions, which serve AVX-512, AVX2, SSE2 and aarch64 alike; only bf16 dot products and
// compress-stores have intrinsics of their own, where the machine has them.
#pragma once
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <cmath>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef float vf_u __attribute__((vector_size(LANES * 4), aligned(4)));  // unaligned loads and stores
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

constexpr int GROUP = 16;           // keys side by side in a packed index key
constexpr int BLOCK = 64;           // keys of one page, scored together
constexpr int PARTS = GROUP / LANES;  // vectors that hold one group

static inline vf load(const float* p) { return *(const vf_u*)p; }
static inline void store(float* p, vf x) { *(vf_u*)p = x; }
static inline vf splat(float x) { return x - vf{}; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }

// a * b + c, rounded once where the machine can. Of two products in a sum compilers choose which one to round, here so and
// there so; where two places must agree to the bit, this says it.
static inline float fused(float a, float b, float c) {
#ifdef FP_FAST_FMAF
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}
static inline vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int l = 0; l < LANES; l++) c[l] = fused(a[l], b[l], c[l]);
  return c;
#endif
}

static inline float widen(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline uint16_t narrow(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2), aligned(2)));
static inline vf load(const uint16_t* p) { return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16); }
static inline vu narrowed(vf x) {  // bf16 in the upper halves, rounded as above, and what was cut off in the lower ones
  const vu bits = (vu)x, rounded = bits + 0x7fff + (bits >> 16 & 1), nan = (vu)((bits & 0x7fffffff) > 0x7f800000);
  return (rounded & ~nan) | ((bits | 0x400000) & nan);
}
static inline void store(uint16_t* p, vf x) { *(vh*)p = __builtin_convertvector(narrowed(x) >> 16, vh); }
static inline float get(const float* x) { return *x; }
static inline float get(const uint16_t* x) { return widen(*x); }
static inline void put(float* to, float x) { *to = x; }
static inline void put(uint16_t* to, float x) { *to = narrow(x); }

#ifdef __AVX512BF16__
// sum += pairs of bf16 times pairs of bf16. As intrinsics gcc spills what the keys of a block are loaded into.
static inline void dot_pairs(__m512& sum, __m512i keys, __m512i q) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(q)); }
#endif
#ifdef __AVX512VNNI__
// sum += unsigned bytes times signed ones, four at a time. As an intrinsic gcc spills its sums.
static inline void dot_bytes(__m512i& sum, __m512i bytes, __m512i q) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(q)); }
#endif

// n values as int8, the largest becoming 127; returns their scale.
template <class X> static inline float quantise_row(const X* x, int n, int8_t* y) {
  float most = 0;
  for (int i = 0; i < n; i++) most = std::max(most, std::fabs(get(x + i)));
  const float scale = std::max(most, 1e-30f) / 127.f;
  for (int i = 0; i < n; i++) y[i] = (int8_t)(int32_t)std::nearbyint(get(x + i) / scale);
  return scale;
}

// exp with a relative error below 3e-7; 0 below -87, at most e^88.
static inline vf vexp(vf x) {
  x = vmax(x, splat(-87.f));
  x = x < 88.f ? x : splat(88.f);
  vf t = x * splat(1.44269504088896f);
  vf n = (t + splat(12582912.f)) - splat(12582912.f);  // to the nearest integer
  vf f = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
  vf y = splat(1.9875691500e-4f);
  y = y * f + splat(1.3981999507e-3f);
  y = y * f + splat(8.3334519073e-3f);
  y = y * f + splat(4.1665795894e-2f);
  y = y * f + splat(1.6666665459e-1f);
  y = y * f + splat(5.0000001201e-1f);
  y = y * f * f + f + splat(1.f);
  vi bits = __builtin_convertvector(n, vi);
  bits = (bits + 127) << 23;
  return y * (vf)bits;
}

template <class T> struct Aligned {  // 64-byte aligned scratch; 0 places until it grows
  T* data = nullptr;
  size_t size = 0;
  explicit Aligned(size_t n = 0) { at_least(n); }
  ~Aligned() { free(data); }
  Aligned(const Aligned&) = delete;
  T* at_least(size_t n) {  // forgets what it held when it has to grow
    if (n > size) {
      free(data);
      data = (T*)aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64);
      size = n;
    }
    return data;
  }
};
