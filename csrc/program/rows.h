// Sparse rows whose entries know where their pixels lie, and the blocks of pixels they are run over:
// what templates and emitted code share.
#pragma once
#include <cstdint>
#include <vector>

#include "../cpu/kernels.h"

namespace dass {

// y[r, p] = act(bias[r] + sum_i values[i] * x[offsets[i] + p] + residual[r, p])
struct SparseRows {
  std::vector<int32_t> indptr;   // rows + 1
  std::vector<int32_t> offsets;  // floats from x
  std::vector<float> values;
  std::vector<float> bias;
  std::vector<int32_t> output;  // which output row each row is: they may be sorted
  Activation activation = kNone;
  bool residual = false;
  int64_t ldy = 0;  // floats from an output row to the next
  int64_t ldr = 0;  // the same of the residual

  int64_t rows() const { return static_cast<int64_t>(bias.size()); }
  int64_t count() const { return static_cast<int64_t>(values.size()); }
};

constexpr int kBlockMasks = 8;

// `V` vectors of pixels: the first one at x and y (in floats). Bit j of masks[v] says whether lane j of
// vector v is a pixel; the other lanes are stored as zeros, which is what padding between rows is.
struct Block {
  int32_t x;
  int32_t y;
  uint16_t masks[kBlockMasks];
};

}  // namespace dass
