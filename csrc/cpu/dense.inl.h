// Pooling, element by element, means, and a dense matrix times a vector.
#pragma once
#include "activation.inl.h"
#include "dense.h"
#include "depthwise.inl.h"
#include "vec.h"

namespace dass {
namespace DASS_ISA_NAME {

constexpr float kLowest = -__builtin_inff();

// Element v of a row that is read with a stride.
template <class Use>
DASS_INLINE void with_fetch(int64_t pixel, int64_t stride, Use use) {
  if (stride == 1)
    use([](const float* p, int64_t v) { return fetch<kSideBySide>(p, v, 1); });
  else if (pixel > 1)
    use([stride](const float* p, int64_t v) { return fetch<kApart>(p, v, stride); });
  else if (stride == 2)
    use([](const float* p, int64_t v) { return fetch<kEveryOther>(p, v, 2); });
  else
    use([stride](const float* p, int64_t v) {
      float x[Vec<float>::lanes];
      for (int i = 0; i < Vec<float>::lanes; ++i) x[i] = p[(v * Vec<float>::lanes + i) * stride];
      return Vec<float>::load(x);
    });
}

// One row of windows, summed down the columns first: scratch[left + x] for every input column.
DASS_INLINE void pool_down(const PoolArgs& a, const float* x, int64_t row) {
  constexpr int lanes = Vec<float>::lanes;
  const int64_t floats = a.in_columns * a.y.pixel, left = a.left * a.y.pixel;
  const float border = a.maximum ? kLowest : 0.0f;
  for (int64_t i = 0; i < left; ++i) a.scratch[i] = border;
  const int64_t top = row * a.stride_h - a.top;
  for (int64_t v = 0; v * lanes < floats; ++v) {
    Vec<float> sum = Vec<float>::set1(border);
    for (int64_t k = 0; k < a.kernel_h; ++k) {
      const int64_t at = top + k * a.dilation_h;
      if (at < 0 || at >= a.in_rows) continue;
      const Vec<float> in = Vec<float>::load(x + at * a.x.pitch + v * lanes);
      sum = a.maximum ? larger(sum, in) : sum + in;
    }
    sum.store(a.scratch + left + v * lanes);
  }
  for (int64_t i = left + floats; i < a.scratch_floats; ++i) a.scratch[i] = border;
}

void pool(const PoolArgs& a) {
  constexpr int lanes = Vec<float>::lanes;
  const RowStore out(a.y.columns * a.y.pixel, a.y.zeros);
  with_fetch(a.y.pixel, a.stride_w, [&](auto get) {
    for (int64_t c = 0; c < a.y.channels; ++c) {
      const Vec<float> scale = Vec<float>::set1(a.scale ? a.scale[c] : 1.0f);
      const Vec<float> bias = Vec<float>::set1(a.bias ? a.bias[c] : 0.0f);
      for (int64_t row = 0; row < a.y.rows; ++row) {
        pool_down(a, a.x.data + c * a.x.channel, row);
        float* y = a.y.data + c * a.y.channel + row * a.y.pitch;
        for (int64_t v = 0; v < out.vectors; ++v) {
          Vec<float> sum = get(a.scratch, v);
          for (int64_t k = 1; k < a.kernel_w; ++k) {
            const Vec<float> in = get(a.scratch + k * a.dilation_w * a.y.pixel, v);
            sum = a.maximum ? larger(sum, in) : sum + in;
          }
          if (!a.maximum) sum = sum * Vec<float>::set1(a.by_row[row]) * Vec<float>::load(a.by_column + v * lanes);
          if (a.scale || a.bias) sum = sum * scale + bias;
          out.store(activate_any(sum, a.activation), y, v);
        }
        out.finish(y);
      }
    }
  });
}

// The pixels of register v that x has, zeros in the others; nothing past `have` floats is read.
template <class Get>
DASS_INLINE Vec<float> map_in(const MapArgs& a, const float* x, int64_t v, int64_t have, Get get) {
  constexpr int lanes = Vec<float>::lanes;
  const int64_t left = have - v * lanes;
  if (left <= 0) return Vec<float>::zero();
  const int64_t most = (v + 1) * lanes * a.stride;  // what a whole register reads of
  if (most <= have * a.stride - a.stride + 1) return get(x, v);
  if (a.stride == 1 && left < lanes) return Vec<float>::load_n(x + v * lanes, static_cast<int>(left));
  if (a.stride == 1 || a.y.pixel > 1) return get(x, v);
  float in[lanes];
  for (int i = 0; i < lanes; ++i) in[i] = i < left ? x[(v * lanes + i) * a.stride] : 0.0f;
  return Vec<float>::load(in);
}

template <class Get>
DASS_INLINE void map_row(const MapArgs& a, const float* x, const float* other, int64_t c, float* y, Get get) {
  constexpr int lanes = Vec<float>::lanes;
  const RowStore out(a.y.columns * a.y.pixel, a.y.zeros);
  const int64_t have = a.in_columns * a.y.pixel;
  for (int64_t v = 0; v < out.vectors; ++v) {
    Vec<float> value = map_in(a, x, v, have, get);
    if (a.combine == kAdd) value = value + Vec<float>::load(other + v * lanes);
    if (a.combine == kMul) value = value * Vec<float>::load(other + v * lanes);
    if (a.combine == kMulChannel)
      value = value * (a.y.pixel > 1 ? Vec<float>::load(other) : Vec<float>::set1(other[0]));
    if (a.scale) value = value * Vec<float>::set1(a.scale[c]);
    if (a.bias) value = value + Vec<float>::set1(a.bias[c]);
    out.store(activate_any(value, a.activation), y, v);
  }
  out.finish(y);
}

void map(const MapArgs& a) {
  const int64_t floats = a.y.columns * a.y.pixel;
  with_fetch(a.y.pixel, a.stride, [&](auto get) {
    for (int64_t c = 0; c < a.y.channels; ++c)
      for (int64_t row = 0; row < a.y.rows; ++row) {
        float* y = a.y.data + c * a.y.channel + row * a.y.pitch;
        if (row < a.in_rows) {
          const float* other = a.other.data + c * a.other.channel + row * a.other.pitch;
          map_row(a, a.x.data + c * a.x.channel + row * a.x.pitch, other, c, y, get);
        } else {
          zero_floats(y, floats + a.y.zeros);
        }
      }
  });
}

void mean(const MeanArgs& a) {
  constexpr int lanes = Vec<float>::lanes;
  const int64_t floats = a.columns * a.pixel;
  const Vec<float> share = Vec<float>::set1(1.0f / static_cast<float>(a.rows * a.columns));
  for (int64_t c = 0; c < a.channels; ++c) {
    Vec<float> sum = Vec<float>::zero();
    for (int64_t row = 0; row < a.rows; ++row) {
      const float* x = a.x.data + c * a.x.channel + row * a.x.pitch;
      for (int64_t v = 0; v * lanes < floats; ++v)
        sum = sum + Vec<float>::load(x + v * lanes).keep(lanes_left(floats, v));
    }
    if (a.pixel > 1)
      (sum * share).store(a.y + c * lanes);
    else
      a.y[c] = sum.sum() * (1.0f / static_cast<float>(a.rows * a.columns));
  }
}

template <int Rows>
DASS_INLINE void gemv_dense_rows(const DenseGemvArgs& a, int64_t row) {
  constexpr int lanes = Vec<float>::lanes;
  Vec<float> acc[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) acc[r] = Vec<float>::zero();
  const float* w = a.weights + row * a.columns;
  int64_t k = 0;
  for (; k + lanes <= a.columns; k += lanes) {
    const Vec<float> x = Vec<float>::load(a.x + k);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r].fma(Vec<float>::load(w + r * a.columns + k), x);
  }
  if (const int left = static_cast<int>(a.columns - k)) {
    const Vec<float> x = Vec<float>::load_n(a.x + k, left);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r].fma(Vec<float>::load_n(w + r * a.columns + k, left), x);
  }
  for (int r = 0; r < Rows; ++r)
    activate_any(Vec<float>::set1(acc[r].sum() + a.bias[row + r]), a.activation).store_n(a.y + row + r, 1);
}

void gemv_dense(const DenseGemvArgs& a) {
  int64_t row = a.row_begin;
  for (; row + 4 <= a.row_end; row += 4) gemv_dense_rows<4>(a, row);
  for (; row < a.row_end; ++row) gemv_dense_rows<1>(a, row);
}

constexpr DenseKernels kDense = {{&depthwise<3>, &depthwise<5>, &depthwise<7>}, &pool, &map, &mean, &gemv_dense};

}  // namespace DASS_ISA_NAME
}  // namespace dass
