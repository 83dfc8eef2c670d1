// A weight matrix times one vector: bound by the bytes of the weights, so they are kept as a
// bit mask and packed values (1 bit + 4 bytes x density a weight) and expanded in registers.
#pragma once
#include "kernels.h"
#include "spmm.inl.h"
#include "vec.h"

namespace dass {
namespace DASS_ISA_NAME {

#if defined(DASS_ISA_AVX512)
// Rows done together: their value pointers advance by data-dependent counts, and several chains
// hide that latency.
constexpr int kGemvRows = 4;

template <int Rows>
DASS_INLINE void gemv_rows(const GemvTile<float>& t, int64_t row) {
  const float* x = t.x;
  const float* p[Rows];
  const uint16_t* bits[Rows];
  __m512 acc[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    p[r] = t.values + t.indptr[row + r];
    bits[r] = t.bits + (row + r) * t.words;
    acc[r] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < t.words; ++w) {
    const __m512 xs = _mm512_loadu_ps(x + 16 * w);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __mmask16 m = bits[r][w];
      // Masked, so that NaN or infinity in x does not meet the zeros between the weights.
      acc[r] = _mm512_mask3_fmadd_ps(_mm512_maskz_expandloadu_ps(m, p[r]), xs, acc[r], m);
      p[r] += __builtin_popcount(m);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const float sum = _mm512_reduce_add_ps(acc[r]) + (t.bias ? t.bias[row + r] : 0.0f);
    const Vec<float> y = activate(Vec<float>::set1(sum), t.activation);
    y.store_n(t.y + row + r, 1);
  }
}

DASS_INLINE void gemv_all(const GemvTile<float>& t) {
  int64_t row = t.row_begin;
  for (; row + kGemvRows <= t.row_end; row += kGemvRows) gemv_rows<kGemvRows>(t, row);
  for (; row < t.row_end; ++row) gemv_rows<1>(t, row);
}
#endif

}  // namespace DASS_ISA_NAME
}  // namespace dass
