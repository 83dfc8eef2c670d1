// Blocked transposition: the conversion between NCHW and layouts with the batch innermost.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace dass {
namespace DASS_ISA_NAME {

#if defined(DASS_ISA_AVX512)
DASS_INLINE void transpose_tile(const float* src, int64_t lds, float* dst, int64_t ldd, int rows, int cols) {
  __m512 a[16], b[16];
  const __mmask16 keep = Vec<float>::first(cols);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_maskz_loadu_ps(keep, src + i * lds) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
  const __mmask16 out = Vec<float>::first(rows);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 c0 = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
    const __m512 c1 = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
    const __m512 c2 = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
    const __m512 c3 = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
    if (i < cols) _mm512_mask_storeu_ps(dst + i * ldd, out, c0);
    if (i + 4 < cols) _mm512_mask_storeu_ps(dst + (i + 4) * ldd, out, c1);
    if (i + 8 < cols) _mm512_mask_storeu_ps(dst + (i + 8) * ldd, out, c2);
    if (i + 12 < cols) _mm512_mask_storeu_ps(dst + (i + 12) * ldd, out, c3);
  }
}
#endif

template <class T>
DASS_INLINE void transpose_tile(const T* src, int64_t lds, T* dst, int64_t ldd, int rows, int cols) {
  for (int j = 0; j < cols; ++j)
    for (int i = 0; i < rows; ++i) dst[j * ldd + i] = src[i * lds + j];
}

template <class T>
void transpose(const T* src, int64_t lds, T* dst, int64_t ldd, int64_t rows, int64_t cols) {
  constexpr int step = 16;
  for (int64_t i = 0; i < rows; i += step)
    for (int64_t j = 0; j < cols; j += step)
      transpose_tile(src + i * lds + j, lds, dst + j * ldd + i, ldd,
                     static_cast<int>(rows - i < step ? rows - i : step),
                     static_cast<int>(cols - j < step ? cols - j : step));
}

}  // namespace DASS_ISA_NAME
}  // namespace dass
