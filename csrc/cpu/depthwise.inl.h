// Dense depthwise convolutions of planes with zeros around them.
//
// Several output rows at a time: a register of pixels is loaded once for all the taps of a column that
// meet it, so a 3 x 3 takes less than 4 loads an output instead of 9 and is bound by its multiply-adds.
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
  constexpr int lanes = Vec<float>::lanes;
  for (; count >= lanes; count -= lanes, y += lanes) Vec<float>::zero().store(y);
  if (count > 0) Vec<float>::zero().store_n(y, static_cast<int>(count));
}

// A row of `floats` pixels and the `zeros` behind it, as registers: nothing past them is written.
struct RowStore {
  int64_t floats;
  int64_t zeros;
  int64_t vectors;

  DASS_INLINE RowStore(int64_t f, int64_t z)
      : floats(f), zeros(z), vectors((f + Vec<float>::lanes - 1) / Vec<float>::lanes) {}
  DASS_INLINE void store(Vec<float> value, float* y, int64_t v) const {
    constexpr int lanes = Vec<float>::lanes;
    const int64_t left = floats - v * lanes;
    if (left >= lanes) return value.store(y + v * lanes);
    const int64_t room = left + zeros < lanes ? left + zeros : lanes;
    value.keep((1u << left) - 1u).store_n(y + v * lanes, static_cast<int>(room));
  }
  // What lies past the last register.
  DASS_INLINE void finish(float* y) const {
    const int64_t done = vectors * Vec<float>::lanes;
    if (floats + zeros > done) zero_floats(y + done, floats + zeros - done);
  }
};

// An activation that clamps; hardswish is done apart.
struct Clamp {
  Vec<float> low, high;
  bool hardswish;

  DASS_INLINE explicit Clamp(Activation a)
      : low(Vec<float>::set1(a == kRelu || a == kRelu6 ? 0.0f : -__builtin_inff())),
        high(Vec<float>::set1(a == kRelu6 ? 6.0f : __builtin_inff())),
        hardswish(a == kHardswish) {}
  DASS_INLINE Vec<float> operator()(Vec<float> v) const {
    if (hardswish) return activate(v, kHardswish);
    return vmin(high, vmax(low, v));
  }
};

// The K taps of one row of pixels for a register of outputs. Near: taps are neighbours in memory, so
// every other one of two registers gives two taps and each further one takes one more element.
template <int K, Fetch F, bool Near>
DASS_INLINE void row_taps(const float* p, int64_t tap, int64_t stride, Vec<float>* in) {
  constexpr int lanes = Vec<float>::lanes;
  if constexpr (F == kEveryOther && Near) {
    const Vec<float> a = Vec<float>::load(p), b = Vec<float>::load(p + lanes);
    in[0] = Vec<float>::even(a, b);
    in[1] = Vec<float>::odd(a, b);
#pragma GCC unroll 8
    for (int k = 2; k < K; ++k) in[k] = Vec<float>::shift_in(in[k - 2], p[2 * lanes + k - 2]);
  } else {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) in[k] = fetch<F>(p + k * (Near ? 1 : tap), 0, stride);
  }
}

// `Rows` rows of one channel. With more than one row, input row i is tap i - r * Down of output row r.
template <int K, Fetch F, bool Near, int Rows, int Down>
DASS_INLINE void depthwise_rows(const DepthwiseArgs& a, const RowStore& out, const Clamp& act, const float* x, float* y,
                                const Vec<float>* w, Vec<float> bias) {
  constexpr int lanes = Vec<float>::lanes;
  const int64_t row = a.tap_row, tap = a.tap_column, pitch = a.y.pitch, stride = a.stride;
  const int64_t step = (F == kSideBySide ? 1 : stride) * lanes;
  const int64_t whole = out.floats / lanes;
  for (int64_t v = 0; v < out.vectors; ++v, x += step) {
    Vec<float> acc[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r] = bias;
#pragma GCC unroll 32
    for (int i = 0; i < (Rows - 1) * Down + K; ++i) {
      Vec<float> in[K];
      row_taps<K, F, Near>(x + i * row, tap, stride, in);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
          if (i - r * Down >= 0 && i - r * Down < K) acc[r].fma(w[(i - r * Down) * K + k], in[k]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r] = act(acc[r]);
    if (v < whole) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[r].store(y + r * pitch + v * lanes);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) out.store(acc[r], y + r * pitch, v);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) out.finish(y + r * pitch);
}

// Rows [row, rows) as far as they go in groups of `Rows`; the first row that is left.
template <int K, Fetch F, bool Near, int Rows, int Down>
DASS_INLINE int64_t depthwise_groups(const DepthwiseArgs& a, const RowStore& out, const Clamp& act, const float* x,
                                     float* y, const Vec<float>* w, Vec<float> bias, int64_t row) {
  for (; row + Rows <= a.y.rows; row += Rows)
    depthwise_rows<K, F, Near, Rows, Down>(a, out, act, x + row * a.stride_row, y + row * a.y.pitch, w, bias);
  return row;
}

template <int K, Fetch F, bool Near>
DASS_INLINE void depthwise_planes(const DepthwiseArgs& a) {
  // AVX-512 has the registers for the weights and the sums of many rows.
  constexpr bool wide = Vec<float>::lanes == 16;
  constexpr int Down = F == kSideBySide ? 1 : 2;
  const bool together = a.stride_row == Down * a.tap_row;
  const RowStore out(a.y.columns * a.y.pixel, a.y.zeros);
  const Clamp act(a.activation);
  for (int64_t c = 0; c < a.y.channels; ++c) {
    Vec<float> w[K * K];
#pragma GCC unroll 64
    for (int k = 0; k < K * K; ++k) w[k] = Vec<float>::set1(a.weights[c * K * K + k]);
    const Vec<float> bias = Vec<float>::set1(a.bias[c]);
    const float* x = a.x.data + c * a.x.channel;
    float* y = a.y.data + c * a.y.channel;
    int64_t row = 0;
    if (together) {
      if constexpr (K == 3 && wide && F != kEveryOther) {
        if (a.y.rows % 7 == 0) row = depthwise_groups<K, F, Near, 7, Down>(a, out, act, x, y, w, bias, row);
        row = depthwise_groups<K, F, Near, 8, Down>(a, out, act, x, y, w, bias, row);
      }
      if constexpr (K < 7) row = depthwise_groups<K, F, Near, 4, Down>(a, out, act, x, y, w, bias, row);
      row = depthwise_groups<K, F, Near, 2, Down>(a, out, act, x, y, w, bias, row);
    }
    depthwise_groups<K, F, Near, 1, 1>(a, out, act, x, y, w, bias, row);
  }
}

template <int K>
void depthwise(const DepthwiseArgs& a) {
  if (a.y.pixel > 1 && a.stride > 1)
    depthwise_planes<K, kApart, false>(a);
  else if (a.stride == 2 && a.tap_column == 1)
    depthwise_planes<K, kEveryOther, true>(a);
  else if (a.stride == 2)
    depthwise_planes<K, kEveryOther, false>(a);
  else if (a.tap_column == 1)
    depthwise_planes<K, kSideBySide, true>(a);
  else
    depthwise_planes<K, kSideBySide, false>(a);
}

}  // namespace DASS_ISA_NAME
}  // namespace dass
