// Sparse rows whose entries know where their pixels lie, the blocks of pixels they are run over, and
// the two ways to run them: templates and emitted code.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "emit.h"
#include "step.h"

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
  bool relu_in = false;  // emitted code only
  int64_t ldy = 0;       // floats from an output row to the next
  int64_t ldr = 0;       // the same of the residual

  int64_t rows() const { return static_cast<int64_t>(bias.size()); }
  int64_t count() const { return static_cast<int64_t>(values.size()); }
};

// Blocks of `vectors` registers of pixels. The first one of a block is at x and y (in floats); bit j of
// its mask v says whether lane j of register v is a pixel. The other lanes are stored as zeros, which is
// what the padding between rows is.
class Blocks {
 public:
  explicit Blocks(int64_t vectors) : vectors_(vectors) {}
  // Registers [begin, end) of a plane of one image, as one long row: register v holds elements
  // v * lanes - shift and on, of which those within rows [first, last) are pixels, and lies at
  // v * lanes + to_x and v * lanes + to_y.
  struct Flat {
    int64_t begin, end, to_x, to_y;
    int64_t first, last, pitch, columns, shift;
  };
  void add_flat(const Flat& f, int64_t lanes);
  // All pixels of a picture whose pixel is a register, `deep` rows at a time.
  void add_pixels(const Place& x, const Place& y, int64_t deep);

  int64_t vectors() const { return vectors_; }
  int64_t count() const { return static_cast<int64_t>(words_.size()) / stride(); }
  int64_t stride() const { return 2 + vectors_; }  // in words
  const int32_t* at(int64_t i) const { return words_.data() + i * stride(); }

 private:
  int64_t vectors_;
  std::vector<int32_t> words_;  // x, y, masks of each
};

class RowsRunner {
 public:
  // sort: rows in the order of their lengths, so that the end of the inner loop is foreseen; then a
  // tile's outputs are not side by side.
  RowsRunner(const RowsSpec& spec, RowsKernel kernel, bool sort);

  // Rows are cut into tiles, which may be run apart.
  int64_t tiles() const { return static_cast<int64_t>(begins_.size()) - 1; }
  std::pair<int64_t, int64_t> rows_of(int64_t tile) const { return {begins_[tile], begins_[tile + 1]}; }
  // First of the tiles of part `part` of `parts`.
  std::pair<int64_t, int64_t> tiles_of(int64_t part, int64_t parts) const { return share(tiles(), part, parts); }
  void run(int64_t first, int64_t last, const float* x, float* y, const float* residual, const Blocks& blocks,
           int64_t begin, int64_t end) const;

  bool emitted() const { return emitted_ != nullptr; }
  int64_t vectors() const { return kernel_.vectors; }
  int64_t deep() const { return kernel_.deep; }
  // Floats from a run of pixels of a block to the next, of x and y.
  void set_gaps(int64_t x, int64_t y) { gap_ = x, out_gap_ = y; }
  int64_t chunk() const { return kernel_.chunk; }
  int64_t lanes() const { return lanes_; }
  std::string name() const;

 private:
  void run_templates(int64_t row, int64_t end, const float* x, float* y, const float* residual, const int32_t* block,
                     int64_t vectors) const;

  RowsKernel kernel_;
  const KernelTable& table_;
  int64_t lanes_;
  int64_t gap_ = 0, out_gap_ = 0;
  SparseRows rows_;
  std::vector<int64_t> begins_;
  std::vector<int32_t> cuts_;  // offsets at which stages end, see EmitTile
  std::unique_ptr<EmittedRows> emitted_;
};

}  // namespace dass
