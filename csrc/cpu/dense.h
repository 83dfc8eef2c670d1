// Dense kernels that a compiled network needs beside its sparse ones, and their arguments.
//
// A picture is a set of planes: element (c, y, x) lies at c * channel + (y * pitch + x) * pixel. pixel is
// 1 (one image) or the lanes of a register (as many images side by side, the batch innermost). Between
// the rows and around the planes lie zeros, which serve as padding.
#pragma once
#include "kernels.h"

namespace dass {

// Everything below counts in floats, but for `rows` and `columns`, which are pixels.
struct Picture {
  const float* data;  // element (0, 0) of the first channel
  int64_t channel;
  int64_t pitch;
};

// One row after the other of `channels` planes. `zeros` floats behind each row are set to zero.
struct PlanesOut {
  float* data;
  int64_t channel;
  int64_t pitch;
  int64_t channels;
  int64_t rows;
  int64_t columns;
  int64_t pixel;
  int64_t zeros;
};

// y = act(sum over taps of w * x + bias), each channel its own weights.
struct DepthwiseArgs {
  Picture x;  // data at the first tap of output (0, 0)
  PlanesOut y;
  const float* weights;  // [channels][kernel * kernel]
  const float* bias;     // [channels]
  int64_t tap_row;       // from a tap to the one below
  int64_t tap_column;
  int64_t stride_row;  // from what output row 0 reads to what row 1 reads
  int64_t stride;      // pixels
  Activation activation;
};

// y = act(scale * (maximum or sum over the window) + bias): sums are multiplied with by_row[y] *
// by_column[x] first.
struct PoolArgs {
  Picture x;  // data at element (0, 0)
  PlanesOut y;
  int64_t in_rows;
  int64_t in_columns;
  int64_t kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w;
  bool maximum;
  const float* by_row;     // [rows], sums only
  const float* by_column;  // [columns * pixel], sums only
  const float* scale;      // [channels] or null
  const float* bias;       // [channels] or null
  float* scratch;          // (left + in_columns + right border) * pixel + a register
  int64_t scratch_floats;
  Activation activation;
};

enum Combine : int32_t { kCopy = 0, kAdd = 1, kMul = 2, kMulChannel = 3 };

// y = act(scale * (x combined with other) + bias), taking every `stride`-th pixel of a row of x. x may
// end early: pixels past `in_rows` and `in_columns` are zeros.
struct MapArgs {
  Picture x;      // pitch: from what a row of y reads to what the next one reads
  Picture other;  // kMulChannel: one factor (or `pixel` factors) per channel
  PlanesOut y;
  int64_t in_rows;     // rows of y that x has
  int64_t in_columns;  // columns of y that x has
  int64_t stride;
  Combine combine;
  const float* scale;
  const float* bias;
  Activation activation;
};

// y[c] = mean of channel c.
struct MeanArgs {
  Picture x;
  float* y;
  int64_t channels, rows, columns, pixel;
};

// y[r] = act(bias[r] + sum_k w[r, k] x[k]), w in rows of `columns`.
struct DenseGemvArgs {
  const float* x;
  const float* weights;
  const float* bias;
  float* y;
  int64_t row_begin, row_end, columns;
  Activation activation;
};

struct DenseKernels {
  void (*depthwise[3])(const DepthwiseArgs&);  // kernel 3, 5, 7
  void (*pool)(const PoolArgs&);
  void (*map)(const MapArgs&);
  void (*mean)(const MeanArgs&);
  void (*gemv)(const DenseGemvArgs&);
};

// Activations that only `map`, `pool` and `gemv` know, since they need an exponential.
constexpr bool is_simple(Activation a) { return a <= kHardswish; }

}  // namespace dass
