// Machine code made for one layer: for sparse rows no index is loaded and no loop ends at an unforeseen
// place; depthwise convolutions keep their weights in registers.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../cpu/kernels.h"

namespace dass {

struct SparseRows;

// `height` outputs x `vectors` vectors of pixels are summed in registers at a time. Entries are done in
// stages, those whose offsets are below the first of `cuts` first: what a stage reads stays in L1 while
// all rows pass over it, and sums wait in memory in between.
struct EmitTile {
  int height;
  int vectors;
  std::vector<int32_t> cuts;
};

class EmittedRows {
 public:
  virtual ~EmittedRows() = default;
  // Row tiles [first, last) over `count` blocks, `stride` words apart: x, y and masks, see Blocks.
  virtual void run(int64_t first, int64_t last, const float* x, float* y, const float* residual, const int32_t* blocks,
                   int64_t stride, int64_t count) const = 0;
  virtual int64_t tiles() const = 0;
  virtual int64_t code_bytes() const = 0;
};

// kWeighted: bias + sum of weights times pixels; of one tap, the pixel itself. kMean: the sum of pixels
// times a share, kMaximum: the largest; both know the borders of the picture.
enum WindowOp { kWeighted, kMean, kMaximum };

// What goes over planes of one image channel by channel. Distances in floats.
//   y = act(scale * op(window of x) + bias + residual)
struct EmitWindow {
  WindowOp op;
  int64_t kernel_h, kernel_w, stride, rows, columns;  // stride: of columns
  int64_t tap_row, tap_column, stride_row;
  int64_t y_channel, pitch, zeros;  // zeros: written behind each row
  Activation activation;
  bool scaled;      // weights of a channel are scale and bias (not with kWeighted of many taps)
  int64_t weights;  // floats of a channel
  bool relu_in;     // on what is read
  bool residual;
  int64_t residual_channel, residual_pitch;
  bool exact;  // nothing past a row of x may be read
  // Pools and copies: where windows lie in the picture. 0: zeros lie around it.
  int64_t in_rows, in_columns, top, left, stride_h, dilation_h, dilation_w;
};

struct WindowArgs {
  const float* x;  // the first tap of the first output
  float* y;
  const float* residual;
  const float* weights;    // of each channel, side by side
  const float* shares;     // kMean: of each output, registers of a row padded
  const int32_t* offsets;  // of each channel from x
  int64_t channels;
};

class EmittedWindow {
 public:
  virtual ~EmittedWindow() = default;
  virtual void run(const WindowArgs& args) const = 0;
};

// Why no code can be emitted here: a build without Xbyak, a processor without AVX-512, memory that may
// not be made executable, DASS_EMIT=0. Null if it can.
const char* emit_unavailable();

// Null if emitting is not possible for these rows.
std::unique_ptr<EmittedRows> emit_rows(const SparseRows& rows, const EmitTile& tile);
std::unique_ptr<EmittedWindow> emit_window(const EmitWindow& window);

}  // namespace dass
