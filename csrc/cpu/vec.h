// Vec<T>: one SIMD register of T, for the instruction set this file is compiled for.
//
// Every member is forced inline. A plain inline function compiled with -mavx512f could be the copy
// the linker keeps for baseline code, and an older machine would then die with SIGILL.
#pragma once
#include <cstdint>

#if defined(DASS_ISA_AVX512) || defined(DASS_ISA_AVX2)
#include <immintrin.h>
#elif defined(DASS_ISA_NEON)
#include <arm_neon.h>
#endif

#define DASS_INLINE __attribute__((always_inline)) inline

namespace dass {
namespace DASS_ISA_NAME {

template <class T>
struct Vec;

#if defined(DASS_ISA_AVX512)

template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  __m512 r;
  static DASS_INLINE Vec set1(float v) { return {_mm512_set1_ps(v)}; }
  static DASS_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static DASS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static DASS_INLINE Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static DASS_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  DASS_INLINE void store(float* p) const { _mm512_storeu_ps(p, r); }
  DASS_INLINE void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), r); }
  // The lanes whose bit is set in `mask`, moved together to the front.
  DASS_INLINE Vec compress(uint32_t mask) const { return {_mm512_maskz_compress_ps(static_cast<__mmask16>(mask), r)}; }
  // Zeros in the lanes whose bit is not set.
  DASS_INLINE Vec keep(uint32_t mask) const { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), r)}; }
  // Elements 0, 2, 4, ... (1, 3, 5, ...) of the registers a and b, one after the other.
  static DASS_INLINE Vec even(Vec a, Vec b) { return {_mm512_permutex2var_ps(a.r, every_other(0), b.r)}; }
  static DASS_INLINE Vec odd(Vec a, Vec b) { return {_mm512_permutex2var_ps(a.r, every_other(1), b.r)}; }
  // Elements 1, 2, ... of a, then `next`.
  static DASS_INLINE Vec shift_in(Vec a, float next) {
    const __m512i last = _mm512_castps_si512(_mm512_set1_ps(next));
    return {_mm512_castsi512_ps(_mm512_alignr_epi32(last, _mm512_castps_si512(a.r), 1))};
  }
  static DASS_INLINE __m512i every_other(int first) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_add_epi32(even, _mm512_set1_epi32(first));
  }
  DASS_INLINE void fma(Vec a, Vec b) { r = _mm512_fmadd_ps(a.r, b.r, r); }
  DASS_INLINE float sum() const { return _mm512_reduce_add_ps(r); }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 8;
  __m512d r;
  static DASS_INLINE Vec set1(double v) { return {_mm512_set1_pd(v)}; }
  static DASS_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  static DASS_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static DASS_INLINE Vec load_n(const double* p, int n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  static DASS_INLINE __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  DASS_INLINE void store(double* p) const { _mm512_storeu_pd(p, r); }
  DASS_INLINE void store_n(double* p, int n) const { _mm512_mask_storeu_pd(p, first(n), r); }
  DASS_INLINE Vec compress(uint32_t mask) const { return {_mm512_maskz_compress_pd(static_cast<__mmask8>(mask), r)}; }
  DASS_INLINE Vec keep(uint32_t mask) const { return {_mm512_maskz_mov_pd(static_cast<__mmask8>(mask), r)}; }
  DASS_INLINE void fma(Vec a, Vec b) { r = _mm512_fmadd_pd(a.r, b.r, r); }
  DASS_INLINE double sum() const { return _mm512_reduce_add_pd(r); }
};

DASS_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.r, b.r)}; }
DASS_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.r, b.r)}; }
// max/min return b when either is NaN, so write max(constant, value): a NaN then stays a NaN.
DASS_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.r, b.r)}; }
DASS_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.r, b.r)}; }
DASS_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm512_add_pd(a.r, b.r)}; }
DASS_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm512_mul_pd(a.r, b.r)}; }
DASS_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.r, b.r)}; }
DASS_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return {_mm512_min_pd(a.r, b.r)}; }
// NaN if either is.
DASS_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.r, a.r, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.r, b.r), nan, a.r)};
}

#elif defined(DASS_ISA_AVX2)

// Lane masks for n = 0..8 come from a sliding window over this table.
alignas(64) static constexpr int32_t kSlide[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  __m256 r;
  static DASS_INLINE Vec set1(float v) { return {_mm256_set1_ps(v)}; }
  static DASS_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static DASS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static DASS_INLINE __m256i first(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kSlide + 8 - n));
  }
  static DASS_INLINE Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
  DASS_INLINE void store(float* p) const { _mm256_storeu_ps(p, r); }
  DASS_INLINE void store_n(float* p, int n) const { _mm256_maskstore_ps(p, first(n), r); }
  DASS_INLINE Vec compress(uint32_t mask) const {
    alignas(32) float in[8];
    alignas(32) float out[8] = {};
    _mm256_store_ps(in, r);
    for (int lane = 0, n = 0; lane < 8; ++lane)
      if (mask >> lane & 1u) out[n++] = in[lane];
    return {_mm256_load_ps(out)};
  }
  DASS_INLINE Vec keep(uint32_t mask) const {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits);
    return {_mm256_and_ps(r, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bits)))};
  }
  static DASS_INLINE Vec even(Vec a, Vec b) { return {pairs(_mm256_shuffle_ps(a.r, b.r, 0x88))}; }
  static DASS_INLINE Vec odd(Vec a, Vec b) { return {pairs(_mm256_shuffle_ps(a.r, b.r, 0xdd))}; }
  static DASS_INLINE Vec shift_in(Vec a, float next) {
    const __m256i one_on = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0);
    return {_mm256_blend_ps(_mm256_permutevar8x32_ps(a.r, one_on), _mm256_set1_ps(next), 0x80)};
  }
  static DASS_INLINE __m256 pairs(__m256 v) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
  }
  DASS_INLINE void fma(Vec a, Vec b) { r = _mm256_fmadd_ps(a.r, b.r, r); }
  DASS_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 4;
  __m256d r;
  static DASS_INLINE Vec set1(double v) { return {_mm256_set1_pd(v)}; }
  static DASS_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  static DASS_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static DASS_INLINE __m256i first(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kSlide + 8 - 2 * n));
  }
  static DASS_INLINE Vec load_n(const double* p, int n) { return {_mm256_maskload_pd(p, first(n))}; }
  DASS_INLINE void store(double* p) const { _mm256_storeu_pd(p, r); }
  DASS_INLINE void store_n(double* p, int n) const { _mm256_maskstore_pd(p, first(n), r); }
  DASS_INLINE Vec compress(uint32_t mask) const {
    alignas(32) double in[4];
    alignas(32) double out[4] = {};
    _mm256_store_pd(in, r);
    for (int lane = 0, n = 0; lane < 4; ++lane)
      if (mask >> lane & 1u) out[n++] = in[lane];
    return {_mm256_load_pd(out)};
  }
  DASS_INLINE Vec keep(uint32_t mask) const {
    const __m256i bits = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(static_cast<int64_t>(mask)), bits);
    return {_mm256_and_pd(r, _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, bits)))};
  }
  DASS_INLINE void fma(Vec a, Vec b) { r = _mm256_fmadd_pd(a.r, b.r, r); }
  DASS_INLINE double sum() const {
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(r), _mm256_extractf128_pd(r, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

DASS_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.r, b.r)}; }
DASS_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.r, b.r)}; }
DASS_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.r, b.r)}; }
DASS_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.r, b.r)}; }
DASS_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.r, b.r)}; }
DASS_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.r, b.r)}; }
DASS_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.r, b.r)}; }
DASS_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.r, b.r)}; }
DASS_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
  return {_mm256_blendv_ps(_mm256_max_ps(a.r, b.r), a.r, _mm256_cmp_ps(a.r, a.r, _CMP_UNORD_Q))};
}

#elif defined(DASS_ISA_NEON)

template <>
struct Vec<float> {
  static constexpr int lanes = 4;
  float32x4_t r;
  static DASS_INLINE Vec set1(float v) { return {vdupq_n_f32(v)}; }
  static DASS_INLINE Vec zero() { return set1(0.0f); }
  static DASS_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
  static DASS_INLINE Vec load_n(const float* p, int n) {
    float in[lanes] = {};
    for (int lane = 0; lane < n; ++lane) in[lane] = p[lane];
    return load(in);
  }
  DASS_INLINE void store(float* p) const { vst1q_f32(p, r); }
  DASS_INLINE void store_n(float* p, int n) const {
    float out[lanes];
    store(out);
    for (int lane = 0; lane < n; ++lane) p[lane] = out[lane];
  }
  DASS_INLINE Vec compress(uint32_t mask) const {
    float in[lanes], out[lanes] = {};
    store(in);
    for (int lane = 0, n = 0; lane < lanes; ++lane)
      if (mask >> lane & 1u) out[n++] = in[lane];
    return load(out);
  }
  DASS_INLINE Vec keep(uint32_t mask) const {
    const uint32_t bit[lanes] = {1, 2, 4, 8};
    const uint32x4_t kept = vtstq_u32(vdupq_n_u32(mask), vld1q_u32(bit));
    return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(r), kept))};
  }
  static DASS_INLINE Vec even(Vec a, Vec b) { return {vuzp1q_f32(a.r, b.r)}; }
  static DASS_INLINE Vec odd(Vec a, Vec b) { return {vuzp2q_f32(a.r, b.r)}; }
  static DASS_INLINE Vec shift_in(Vec a, float next) { return {vextq_f32(a.r, vdupq_n_f32(next), 1)}; }
  DASS_INLINE void fma(Vec a, Vec b) { r = vfmaq_f32(r, a.r, b.r); }
  DASS_INLINE float sum() const { return vaddvq_f32(r); }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 2;
  float64x2_t r;
  static DASS_INLINE Vec set1(double v) { return {vdupq_n_f64(v)}; }
  static DASS_INLINE Vec zero() { return set1(0.0); }
  static DASS_INLINE Vec load(const double* p) { return {vld1q_f64(p)}; }
  static DASS_INLINE Vec load_n(const double* p, int n) {
    double in[lanes] = {};
    for (int lane = 0; lane < n; ++lane) in[lane] = p[lane];
    return load(in);
  }
  DASS_INLINE void store(double* p) const { vst1q_f64(p, r); }
  DASS_INLINE void store_n(double* p, int n) const {
    double out[lanes];
    store(out);
    for (int lane = 0; lane < n; ++lane) p[lane] = out[lane];
  }
  DASS_INLINE Vec compress(uint32_t mask) const {
    double in[lanes], out[lanes] = {};
    store(in);
    for (int lane = 0, n = 0; lane < lanes; ++lane)
      if (mask >> lane & 1u) out[n++] = in[lane];
    return load(out);
  }
  DASS_INLINE Vec keep(uint32_t mask) const {
    const uint64_t bit[lanes] = {1, 2};
    const uint64x2_t kept = vtstq_u64(vdupq_n_u64(mask), vld1q_u64(bit));
    return {vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(r), kept))};
  }
  DASS_INLINE void fma(Vec a, Vec b) { r = vfmaq_f64(r, a.r, b.r); }
  DASS_INLINE double sum() const { return vaddvq_f64(r); }
};

DASS_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {vaddq_f32(a.r, b.r)}; }
DASS_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {vmulq_f32(a.r, b.r)}; }
DASS_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return {vmaxq_f32(a.r, b.r)}; }
DASS_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return {vminq_f32(a.r, b.r)}; }
DASS_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {vaddq_f64(a.r, b.r)}; }
DASS_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {vmulq_f64(a.r, b.r)}; }
DASS_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return {vmaxq_f64(a.r, b.r)}; }
DASS_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return {vminq_f64(a.r, b.r)}; }
DASS_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return vmax(a, b); }

#else  // scalar

// `lanes` independent elements; the compiler may keep them in whatever baseline registers exist.
template <class T>
struct Vec {
  static constexpr int lanes = 16 / sizeof(T);
  T r[lanes];
  template <class F>
  static DASS_INLINE Vec make(F f) {
    Vec out;
    for (int i = 0; i < lanes; ++i) out.r[i] = f(i);
    return out;
  }
  static DASS_INLINE Vec set1(T v) {
    return make([v](int) { return v; });
  }
  static DASS_INLINE Vec zero() { return set1(T(0)); }
  static DASS_INLINE Vec load(const T* p) {
    return make([p](int i) { return p[i]; });
  }
  static DASS_INLINE Vec load_n(const T* p, int n) {
    return make([p, n](int i) { return i < n ? p[i] : T(0); });
  }
  DASS_INLINE void store(T* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = r[i];
  }
  DASS_INLINE void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = r[i];
  }
  DASS_INLINE Vec compress(uint32_t mask) const {
    Vec out = zero();
    for (int i = 0, n = 0; i < lanes; ++i)
      if (mask >> i & 1u) out.r[n++] = r[i];
    return out;
  }
  DASS_INLINE Vec keep(uint32_t mask) const {
    return make([&](int i) { return mask >> i & 1u ? r[i] : T(0); });
  }
  static DASS_INLINE Vec even(Vec a, Vec b) { return every_other(a, b, 0); }
  static DASS_INLINE Vec odd(Vec a, Vec b) { return every_other(a, b, 1); }
  static DASS_INLINE Vec shift_in(Vec a, T next) {
    return make([&](int i) { return i + 1 < lanes ? a.r[i + 1] : next; });
  }
  static DASS_INLINE Vec every_other(Vec a, Vec b, int first) {
    return make([&](int i) { return 2 * i < lanes ? a.r[2 * i + first] : b.r[2 * i + first - lanes]; });
  }
  DASS_INLINE void fma(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) r[i] += a.r[i] * b.r[i];
  }
  DASS_INLINE T sum() const {
    T s = r[0];
    for (int i = 1; i < lanes; ++i) s += r[i];
    return s;
  }
};

template <class T>
DASS_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return Vec<T>::make([&](int i) { return a.r[i] + b.r[i]; });
}
template <class T>
DASS_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return Vec<T>::make([&](int i) { return a.r[i] * b.r[i]; });
}
template <class T>
DASS_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return Vec<T>::make([&](int i) { return a.r[i] > b.r[i] ? a.r[i] : b.r[i]; });
}
template <class T>
DASS_INLINE Vec<T> vmin(Vec<T> a, Vec<T> b) {
  return Vec<T>::make([&](int i) { return a.r[i] < b.r[i] ? a.r[i] : b.r[i]; });
}
template <class T>
DASS_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return Vec<T>::make([&](int i) { return a.r[i] > b.r[i] || a.r[i] != a.r[i] ? a.r[i] : b.r[i]; });
}

#endif

}  // namespace DASS_ISA_NAME
}  // namespace dass
