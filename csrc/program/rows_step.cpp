// Sparse convolutions and dense ones that are no depthwise convolutions: rows times panels of pixels.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "../cpu/isa.h"
#include "emit.h"
#include "step.h"

namespace dass {
namespace {

// Rows with many entries first, and equal numbers together: the end of the inner loop is foreseen.
SparseRows sorted_rows(const RowsSpec& s, bool sort) {
  SparseRows m;
  const int64_t rows = static_cast<int64_t>(s.bias.size());
  m.activation = s.activation;
  m.residual = s.has_residual;
  m.ldy = s.y.channel;
  m.ldr = s.has_residual ? s.residual.channel : 0;
  m.output.resize(rows);
  std::iota(m.output.begin(), m.output.end(), 0);
  const auto count = [&](int32_t r) { return s.indptr[r + 1] - s.indptr[r]; };
  if (sort)
    std::stable_sort(m.output.begin(), m.output.end(), [&](int32_t a, int32_t b) { return count(a) > count(b); });
  m.indptr.push_back(0);
  for (int32_t r : m.output) {
    m.offsets.insert(m.offsets.end(), s.offsets.begin() + s.indptr[r], s.offsets.begin() + s.indptr[r + 1]);
    m.values.insert(m.values.end(), s.values.begin() + s.indptr[r], s.values.begin() + s.indptr[r + 1]);
    m.bias.push_back(s.bias[r]);
    m.indptr.push_back(static_cast<int32_t>(m.values.size()));
  }
  return m;
}

// The pixels of y in blocks of `vectors` registers. Planes of one image are one long row with zeros in
// between; with the batch innermost a register is a pixel, and blocks end with their row. The last
// block begins early rather than end late.
std::vector<Block> make_blocks(const Place& x, const Place& y, int64_t lanes, int64_t vectors) {
  std::vector<Block> blocks;
  if (y.pixel > 1) {
    for (int64_t row = 0; row < y.rows; ++row)
      for (int64_t at = 0; at < y.columns; at += vectors) {
        Block b{};
        const int64_t from = std::min(at, y.columns - vectors);
        b.x = static_cast<int32_t>((row * x.pitch + from) * x.pixel);
        b.y = static_cast<int32_t>((row * y.pitch + from) * y.pixel);
        std::fill(b.masks, b.masks + kBlockMasks, uint16_t{0xffff});
        blocks.push_back(b);
      }
    return blocks;
  }
  const int64_t total = (y.end() + lanes - 1) / lanes;
  for (int64_t at = 0; at < total; at += vectors) {
    Block b{};
    const int64_t v = std::min(at, total - vectors);
    b.x = b.y = static_cast<int32_t>(v * lanes);
    for (int64_t i = 0; i < std::min<int64_t>(vectors, kBlockMasks); ++i)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t pixel = (v + i) * lanes + lane;
        if (pixel < y.end() && pixel % y.pitch < y.columns) b.masks[i] |= static_cast<uint16_t>(1u << lane);
      }
    blocks.push_back(b);
  }
  return blocks;
}

class RowsStep : public Step {
 public:
  explicit RowsStep(const RowsSpec& s)
      : x_(s.x),
        y_(s.y),
        residual_(s.residual),
        kernel_(s.kernel),
        table_(active_table()),
        lanes_(table_.f32.lanes),
        rows_(sorted_rows(s, !s.kernel.emitted)) {
    if (s.x.pitch != s.y.pitch && s.y.pixel == 1)
      throw std::invalid_argument("rows: input and output must have one pitch");
    if (s.y.pixel > 1 && s.y.pixel != lanes_) throw std::invalid_argument("rows: one pixel must fill a register");
    written_ = y_.pixel > 1 ? y_.end() : (y_.end() + lanes_ - 1) / lanes_ * lanes_;
    const int64_t most = y_.pixel > 1 ? y_.columns : (y_.end() + lanes_ - 1) / lanes_;
    kernel_.vectors = std::min(kernel_.vectors, most);
    if (kernel_.emitted) {
      emitted_ = emit_rows(rows_, {static_cast<int>(kernel_.height), static_cast<int>(kernel_.vectors)});
      if (emitted_) {
        blocks_ = make_blocks(x_, y_, lanes_, kernel_.vectors);
        return;
      }
      rows_ = sorted_rows(s, true);
      kernel_ = {false, 1, std::min<int64_t>(most, kRunVectors), 0};
    }
    kernel_.vectors = std::min<int64_t>(kernel_.vectors, table_.f32.max_vectors[0]);
    total_ = most;
    if (y_.pixel > 1)
      masks_.assign(total_, ~0u >> (32 - lanes_));
    else
      for (const Block& b : make_blocks(x_, y_, lanes_, 1)) masks_.push_back(b.masks[0]);
  }

  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const float* x = pass.at(x_);
    float* y = pass.at(y_);
    const float* residual = rows_.residual ? pass.at(residual_) : nullptr;
    if (emitted_)
      run_emitted(x, y, residual, part, parts);
    else
      run_templates(x, y, residual, part, parts);
    const auto [first, last] = share(y_.channels, part, parts);
    zero_around(pass, y_, written_, first, last);
    if (y_.pixel > 1 && y_.zeros())
      for (int64_t c = first; c < last; ++c)
        for (int64_t row = 0; row < y_.rows; ++row)
          std::memset(y + c * y_.channel + (row * y_.pitch + y_.columns) * y_.pixel, 0, y_.zeros() * sizeof(float));
  }

  std::string kernel() const override {
    if (emitted_)
      return "emitted " + std::to_string(kernel_.height) + "x" + std::to_string(kernel_.vectors) +
             (kernel_.chunk ? "/" + std::to_string(kernel_.chunk) : "");
    return "spmm " + std::to_string(kernel_.vectors);
  }

 private:
  void run_emitted(const float* x, float* y, const float* residual, int64_t part, int64_t parts) const {
    const int64_t count = static_cast<int64_t>(blocks_.size());
    int64_t t0 = 0, t1 = emitted_->tiles(), b0 = 0, b1 = count;
    if (count >= 4 * parts || t1 < parts)
      std::tie(b0, b1) = share(count, part, parts);
    else
      std::tie(t0, t1) = share(t1, part, parts);
    const int64_t chunk = kernel_.chunk ? kernel_.chunk : count;
    for (int64_t b = b0; b < b1; b += chunk)
      emitted_->run(t0, t1, x, y, residual, blocks_.data() + b, std::min(chunk, b1 - b));
  }

  void run_templates(const float* x, float* y, const float* residual, int64_t part, int64_t parts) const {
    SpmmTile<float> t{};
    t.values = rows_.values.data();
    t.indices = rows_.offsets.data();
    t.indptr = rows_.indptr.data();
    t.rows = rows_.output.data();
    t.outputs = rows_.rows();
    t.ldy = rows_.ldy;
    t.ldr = rows_.ldr;
    t.bias = rows_.bias.data();
    t.activation = rows_.activation;
    t.tail = static_cast<int32_t>(lanes_);
    t.row_end = rows_.rows();
    const int64_t deep = y_.pixel > 1 ? y_.rows : 1, tiles = (total_ + kernel_.vectors - 1) / kernel_.vectors;
    int64_t first = 0, last = deep * tiles;
    if (last >= 4 * parts)
      std::tie(first, last) = share(last, part, parts);
    else
      std::tie(t.row_begin, t.row_end) = part_of_rows(part, parts);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / tiles, v = i % tiles * kernel_.vectors, n = std::min(kernel_.vectors, total_ - v);
      t.x = x + row * x_.pitch * x_.pixel + v * lanes_;
      const int64_t at = row * y_.pitch * y_.pixel + v * lanes_;
      t.y = y + at;
      t.residual = residual ? residual + at : nullptr;
      t.masks = masks_.data() + v;
      t.gap = t.out_gap = first_run(static_cast<int>(n)) * lanes_;
      table_.f32.spmm[kDirect][0][n - 1](t);
    }
  }

  std::pair<int64_t, int64_t> part_of_rows(int64_t part, int64_t parts) const {
    const auto at = [&](int64_t p) {
      const int64_t wanted = (rows_.count() + 4 * rows_.rows()) * p / parts;
      int64_t r = 0;
      while (r < rows_.rows() && rows_.indptr[r] + 4 * r < wanted) ++r;
      return p == parts ? rows_.rows() : r;
    };
    return {at(part), at(part + 1)};
  }

  Place x_, y_, residual_;
  RowsKernel kernel_;
  const KernelTable& table_;
  int64_t lanes_;
  SparseRows rows_;
  int64_t written_ = 0;
  std::unique_ptr<EmittedRows> emitted_;
  std::vector<Block> blocks_;
  int64_t total_ = 0;  // registers of one row (or of all of a plane)
  std::vector<uint32_t> masks_;
};

}  // namespace

StepPtr make_rows(RowsSpec spec) { return std::make_unique<RowsStep>(spec); }

}  // namespace dass
