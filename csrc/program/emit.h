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

// Distances in floats, for planes of one image; `zeros` are written behind each row.
struct EmitDepthwise {
  int64_t kernel, stride, rows, columns;
  int64_t tap_row, tap_column, stride_row;
  int64_t x_channel, y_channel, pitch, zeros;
  Activation activation;
};

class EmittedDepthwise {
 public:
  virtual ~EmittedDepthwise() = default;
  // x: the first tap of the first output. weights: [channels][kernel * kernel + 1], the bias last.
  virtual void run(const float* x, float* y, const float* weights, int64_t channels) const = 0;
};

// Why no code can be emitted here: a build without Xbyak, a processor without AVX-512, memory that may
// not be made executable, DASS_EMIT=0. Null if it can.
const char* emit_unavailable();

// Null if emitting is not possible for these rows.
std::unique_ptr<EmittedRows> emit_rows(const SparseRows& rows, const EmitTile& tile);
std::unique_ptr<EmittedDepthwise> emit_depthwise(const EmitDepthwise& geometry);

}  // namespace dass
