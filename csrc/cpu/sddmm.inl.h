// The weight gradient on the mask: one dot product over pixels per nonzero.
//
// A row's dy tile stays in V registers; each nonzero costs V loads fused into V multiply-adds. The
// sums of eight nonzeros are reduced together and added to eight neighbouring gradients, so nothing
// but the gradient itself is written (a vector of partial sums per nonzero would be 16 times it).
#pragma once
#include "kernels.h"
#include "spmm.inl.h"
#include "vec.h"

namespace dass {
namespace DASS_ISA_NAME {

constexpr int kSumGroup = 8;

// out[g] += sum of the lanes of acc[g], g < kSumGroup.
template <class T>
DASS_INLINE void add_sums(const Vec<T>* acc, T* out) {
#pragma GCC unroll 8
  for (int g = 0; g < kSumGroup; ++g) out[g] += acc[g].sum();
}

#if defined(DASS_ISA_AVX512)
// Three rounds of shuffle and add leave the eight sums in one register.
template <>
DASS_INLINE void add_sums<float>(const Vec<float>* acc, float* out) {
  __m256 h[8];
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g)
    h[g] = _mm256_add_ps(_mm512_castps512_ps256(acc[g].r), _mm512_extractf32x8_ps(acc[g].r, 1));
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(h[4], h[5]), _mm256_hadd_ps(h[6], h[7]));
  const __m256 lo = _mm256_permute2f128_ps(a, b, 0x20);
  const __m256 hi = _mm256_permute2f128_ps(a, b, 0x31);
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), _mm256_add_ps(lo, hi)));
}
#endif

template <class T, int V, int A>
DASS_INLINE Vec<T> dot_tile(const SddmmTile<T>& t, const Vec<T>* dy, int32_t i) {
  constexpr int lanes = Vec<T>::lanes;
  const T* p = column<T, A>(t.x, t.offsets, t.pitch, t.indices[i]);
  Vec<T> sum = Vec<T>::zero();
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sum.fma(dy[v], Vec<T>::load(p + v * lanes));
  return sum;
}

template <class T, int V, int A>
void sddmm(const SddmmTile<T>& t) {
  constexpr int lanes = Vec<T>::lanes;
  for (int64_t block = t.row_begin; block < t.row_end; ++block) {
    const int32_t begin = t.indptr[block];
    const int32_t end = t.indptr[block + 1];
    for (int64_t r = 0; r < t.block && block * t.block + r < t.outputs; ++r) {
      Vec<T> dy[V];
      const T* row = t.dy + (block * t.block + r) * t.lddy;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) dy[v] = Vec<T>::load(row + v * lanes);
      int32_t i = begin;
      if (t.block == 1) {
        for (; i + kSumGroup <= end; i += kSumGroup) {
          Vec<T> acc[kSumGroup];
#pragma GCC unroll 8
          for (int g = 0; g < kSumGroup; ++g) acc[g] = dot_tile<T, V, A>(t, dy, i + g);
          add_sums<T>(acc, t.dvalues + i);
        }
      }
      for (; i < end; ++i) t.dvalues[static_cast<int64_t>(i) * t.block + r] += dot_tile<T, V, A>(t, dy, i).sum();
    }
  }
}

}  // namespace DASS_ISA_NAME
}  // namespace dass
