// One vector type for every machine: 16 floats with AVX-512, 8 with AVX2, 4 elsewhere (NEON, SSE).
//
// Built on the compiler's vector extensions, so that the kernels are written once; intrinsics only where the extension has
// no word for it. The build sets -ffp-contract=off: a product is fused into a sum where fma() says so and nowhere else,
// which keeps every instantiation of a kernel bit-equal to the others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kvray {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define KVRAY_AVX512 1
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define KVRAY_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if defined(KVRAY_AVX512) && defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;  // vdpbf16ps: two bfloat16 products and a float sum per lane
#else
constexpr bool kHasBf16Dot = false;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline vf splat(float x) { return x - vf{}; }
inline vf broadcast(const float* p) {
#if defined(KVRAY_AVX512)
  // By way of integers: a float register move may quieten a NaN, and a word need not be a float.
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return (vf)_mm512_set1_epi32(bits);
#else
  return splat(*p);
#endif
}
inline vi iota() {
  vi x;
  for (int i = 0; i < W; i++) x[i] = i;
  return x;
}

// ---------------------------------------------------------------------------------------------------- load and store

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline vf widen(vh x) {
#if defined(KVRAY_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#else
  return (vf)(__builtin_convertvector(x, vu) << 16);
#endif
}
inline vf load(const bf16* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return widen(x);
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

// Round to the nearest bfloat16, ties to even; NaN stays NaN. What the instruction does besides: subnormals become zeros.
inline vh narrow(vf x) {
#if defined(KVRAY_AVX512) && defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#endif
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  vi is_nan = x != x;
  return __builtin_convertvector((vu)((is_nan & (vi)quiet) | (~is_nan & (vi)rounded)), vh);
}
inline void store(bf16* p, vf x) {
  vh h = narrow(x);
  std::memcpy(p, &h, sizeof h);
}

// The first n (< W) elements, zeros behind them.
template <typename T>
inline vf load_part(const T* p, int n) {
  T part[W] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <typename T>
inline void store_part(T* p, vf x, int n) {
  T part[W];
  store(part, x);
  std::memcpy(p, part, n * sizeof(T));
}
template <typename T>
inline vf load_upto(const T* p, int n) {
  return n >= W ? load(p) : load_part(p, n);
}
template <typename T>
inline void store_upto(T* p, vf x, int n) {
  if (n >= W)
    store(p, x);
  else
    store_part(p, x, n);
}

// -------------------------------------------------------------------------------------------------------- arithmetic

inline vf fma(vf a, vf b, vf c) {
#if defined(KVRAY_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(KVRAY_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The larger; b where either is NaN.
inline vf maximum(vf a, vf b) {
#if defined(KVRAY_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(KVRAY_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Lanes in a fixed order: halves are added (compared) until one is left.
inline float sum(vf x) {
  float lane[W];
  store(lane, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) lane[i] += lane[i + n];
  return lane[0];
}
inline float largest(vf x) {
#if defined(KVRAY_AVX512)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < W; i++) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

// 2^x for x <= 127, exactly 0 below -126.5 (and for -infinity), NaN for NaN. The relative error is below 2e-7 with seven
// terms and below 5e-5 with four, which is enough where the result is rounded to bfloat16 (2^-9).
template <int Terms>
inline vf exp2v(vf x) {
#if defined(KVRAY_AVX512)
  vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = maximum(splat(-127.f), x);
  vf shifted = x + 12582912.f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  vf n = shifted - 12582912.f;
#endif
  vf f = x - n;
  // ln(2)^k / k!
  constexpr float c[8] = {1.f,           6.93147180e-1f, 2.40226507e-1f, 5.55041087e-2f,
                          9.61812911e-3f, 1.33335581e-3f, 1.54035304e-4f, 1.52527338e-5f};
  vf p = splat(c[Terms]);
  for (int k = Terms - 1; k >= 0; k--) p = fma(p, f, splat(c[k]));
#if defined(KVRAY_AVX512)
  const __mmask16 is_seen = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-126.5f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(is_seen, (__m512)p, (__m512)n);
#else
  vi exponent = __builtin_convertvector(n, vi) + 127;
  return p * (vf)(exponent << 23);
#endif
}

constexpr float kLog2E = 1.44269504088896f;

inline vf tanhv(vf x) {
  // 1 - 2 / (e^2x + 1); beyond +-15 it is +-1 in float.
  vf bounded = x > 15.f ? splat(15.f) : (x < -15.f ? splat(-15.f) : x);
  return 1.f - 2.f / (exp2v<7>(bounded * (2.f * kLog2E)) + 1.f);
}

// --------------------------------------------------------------------------------------------------------- transpose

template <int S, size_t... I>
inline void swap_lanes(vf& a, vf& b, std::index_sequence<I...>) {
#if defined(__clang__)
  vf low = __builtin_shufflevector(a, b, ((I & S) ? int(I - S + W) : int(I))...);
  vf high = __builtin_shufflevector(a, b, ((I & S) ? int(I + W) : int(I + S))...);
#else
  vf low = __builtin_shuffle(a, b, vi{((I & S) ? int(I - S + W) : int(I))...});
  vf high = __builtin_shuffle(a, b, vi{((I & S) ? int(I + W) : int(I + S))...});
#endif
  a = low;
  b = high;
}

// Half as many vectors with the same sums: lanes of a and b, added in pairs S apart, take turns of S lanes.
template <int S>
inline vf merge(vf a, vf b) {
  swap_lanes<S>(a, b, std::make_index_sequence<W>{});
  return a + b;
}

// out[i] = factor * the sum of x[i]'s lanes.
inline void sum_four(const vf (&x)[4], float factor, float* out) {
  vf four = merge<2>(merge<1>(x[0], x[1]), merge<1>(x[2], x[3]));  // lane i belongs to x[i % 4]
#if defined(KVRAY_AVX512)
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)four), _mm512_extractf32x8_ps((__m512)four, 1));
#elif defined(KVRAY_AVX2)
  __m256 eight = (__m256)four;
#endif
#if defined(KVRAY_AVX512) || defined(KVRAY_AVX2)
  __m128 sums = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  _mm_storeu_ps(out, _mm_mul_ps(sums, _mm_set1_ps(factor)));
#else
  store(out, four * factor);
#endif
}

// The W x W words in r, rows for columns.
template <int S = 1>
inline void transpose(vf (&r)[W]) {
  if constexpr (S < W) {
    for (int i = 0; i < W; i++)
      if (!(i & S)) swap_lanes<S>(r[i], r[i + S], std::make_index_sequence<W>{});
    transpose<S * 2>(r);
  }
}

// ------------------------------------------------------------------------------------------------------------- words
// What the matrix kernels multiply: a word is one float, or two neighbouring bfloat16 where the machine has their dot
// product. `Word<T>::kElements` elements of the KV's type T make one 32-bit word.

template <typename T, bool IsPair = kHasBf16Dot && sizeof(T) == 2>
struct Word {
  static constexpr int kElements = 1;
  static inline vf load_words(const T* p) { return load(p); }
  static inline vf load_words_upto(const T* p, int n) { return load_upto(p, n); }
  static inline vf dot(vf a, vf b, vf c) { return fma(a, b, c); }
};

#if defined(KVRAY_AVX512) && defined(__AVX512BF16__)
template <typename T>
struct Word<T, true> {
  static constexpr int kElements = 2;
  static inline vf load_words(const T* p) { return load(reinterpret_cast<const float*>(p)); }
  static inline vf load_words_upto(const T* p, int n) {
    if (n >= 2 * W) return load_words(p);
    return (vf)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
  }
  static inline vf dot(vf a, vf b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
};
#endif

}  // namespace kvray
