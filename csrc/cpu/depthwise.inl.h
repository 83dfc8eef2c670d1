// Dense depthwise convolutions of planes with zeros around them.
//
// Several output rows at a time: a register of pixels is loaded once for all the taps of a column that
// meet it, so a 3 x 3 takes 4.5 loads an output instead of 9 and is bound by its multiply-adds.
#pragma once
#include "activation.inl.h"
#include "dense.h"
#include "vec.h"

namespace dass {
namespace DASS_ISA_NAME {

// How a register gets its pixels: side by side; every other one of twice as many; or whole registers
// `stride` apart, with the batch innermost.
enum Fetch { kSideBySide, kEveryOther, kApart };

template <Fetch F>
DASS_INLINE Vec<float> fetch(const float* p, int64_t v, int64_t stride) {
  constexpr int lanes = Vec<float>::lanes;
  if constexpr (F == kSideBySide) return Vec<float>::load(p + v * lanes);
  if constexpr (F == kApart) return Vec<float>::load(p + v * stride * lanes);
  const float* q = p + 2 * v * lanes;
  return Vec<float>::even(Vec<float>::load(q), Vec<float>::load(q + lanes));
}

// The lanes of register v of a row that are pixels.
DASS_INLINE uint32_t lanes_left(int64_t floats, int64_t v) {
  constexpr int lanes = Vec<float>::lanes;
  const int64_t left = floats - v * lanes;
  return left >= lanes ? (1u << (lanes - 1) << 1) - 1u : (1u << left) - 1u;
}

DASS_INLINE void zero_floats(float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = 0.0f;
}

// Rows [row, row + Rows) of one channel; vertical taps `tap_row` apart lie `Step` output rows apart, in
// units of the rows of x that lie `unit` apart.
template <int K, Fetch F, int Rows>
DASS_INLINE void depthwise_rows(const DepthwiseArgs& a, const float* x, float* y, const Vec<float>* w,
                                Vec<float> bias) {
  constexpr int lanes = Vec<float>::lanes;
  const int64_t floats = a.y.columns * a.y.pixel, vectors = (floats + lanes - 1) / lanes;
  for (int64_t v = 0; v < vectors; ++v) {
    Vec<float> acc[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r] = bias;
    if constexpr (Rows > 1) {
      // Stride and dilation 1: input row i is tap i - r of output row r.
#pragma GCC unroll 16
      for (int i = 0; i < Rows + K - 1; ++i)
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
          const Vec<float> in = fetch<F>(x + i * a.tap_row + k * a.tap_column, v, a.stride);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r)
            if (i - r >= 0 && i - r < K) acc[r].fma(w[(i - r) * K + k], in);
        }
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i)
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
          acc[0].fma(w[i * K + k], fetch<F>(x + i * a.tap_row + k * a.tap_column, v, a.stride));
    }
    const uint32_t mask = lanes_left(floats, v);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) activate(acc[r], a.activation).keep(mask).store(y + r * a.y.pitch + v * lanes);
  }
  for (int r = 0; r < Rows; ++r) zero_floats(y + r * a.y.pitch + floats, a.y.zeros);
}

template <int K, Fetch F>
DASS_INLINE void depthwise_planes(const DepthwiseArgs& a) {
  constexpr int kTogether = K == 3 ? 4 : 2;
  const bool together = a.stride == 1 && a.stride_row == a.tap_row;
  for (int64_t c = 0; c < a.y.channels; ++c) {
    Vec<float> w[K * K];
#pragma GCC unroll 64
    for (int k = 0; k < K * K; ++k) w[k] = Vec<float>::set1(a.weights[c * K * K + k]);
    const Vec<float> bias = Vec<float>::set1(a.bias[c]);
    const float* x = a.x.data + c * a.x.channel;
    float* y = a.y.data + c * a.y.channel;
    int64_t row = 0;
    if (together)
      for (; row + kTogether <= a.y.rows; row += kTogether)
        depthwise_rows<K, F, kTogether>(a, x + row * a.stride_row, y + row * a.y.pitch, w, bias);
    for (; row < a.y.rows; ++row) depthwise_rows<K, F, 1>(a, x + row * a.stride_row, y + row * a.y.pitch, w, bias);
  }
}

template <int K>
void depthwise(const DepthwiseArgs& a) {
  if (a.y.pixel > 1 && a.stride > 1)
    depthwise_planes<K, kApart>(a);
  else if (a.stride == 2)
    depthwise_planes<K, kEveryOther>(a);
  else
    depthwise_planes<K, kSideBySide>(a);
}

}  // namespace DASS_ISA_NAME
}  // namespace dass
