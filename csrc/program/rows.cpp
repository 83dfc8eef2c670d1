#include "rows.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "../cpu/isa.h"

namespace dass {
namespace {

SparseRows ordered_rows(const RowsSpec& s, bool sort) {
  SparseRows m;
  const int64_t rows = static_cast<int64_t>(s.bias.size());
  m.activation = s.activation;
  m.residual = s.has_residual;
  m.relu_in = s.relu_in;
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

// Tiles of equal work: an entry counts one, starting and storing a row four.
std::vector<int64_t> balanced(const SparseRows& m, int64_t tiles) {
  std::vector<int64_t> begins{0};
  for (int64_t t = 1, r = 0; t < tiles; ++t) {
    const int64_t wanted = (m.count() + 4 * m.rows()) * t / tiles;
    while (r < m.rows() && m.indptr[r] + 4 * r < wanted) ++r;
    begins.push_back(r);
  }
  begins.push_back(m.rows());
  return begins;
}

}  // namespace

void Blocks::add_flat(const Flat& f, int64_t lanes) {
  for (int64_t at = f.begin; at < f.end; at += vectors_) {
    // The last block begins early rather than end late.
    const int64_t v = std::max(f.begin, std::min(at, f.end - vectors_));
    words_.push_back(static_cast<int32_t>(v * lanes + f.to_x));
    words_.push_back(static_cast<int32_t>(v * lanes + f.to_y));
    for (int64_t i = 0; i < vectors_; ++i) {
      uint32_t mask = 0;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t element = (v + i) * lanes + lane - f.shift;
        const bool inside = element >= f.first * f.pitch && element < f.last * f.pitch;
        if (inside && element % f.pitch < f.columns) mask |= 1u << lane;
      }
      words_.push_back(static_cast<int32_t>(mask));
    }
  }
}

void Blocks::add_pixels(const Place& x, const Place& y, int64_t deep) {
  const int64_t wide = vectors_ / deep;
  for (int64_t at_row = 0; at_row < y.rows; at_row += deep)
    for (int64_t at = 0; at < y.columns; at += wide) {
      const int64_t row = std::min(at_row, y.rows - deep), from = std::min(at, y.columns - wide);
      words_.push_back(static_cast<int32_t>((row * x.pitch + from) * x.pixel));
      words_.push_back(static_cast<int32_t>((row * y.pitch + from) * y.pixel));
      words_.insert(words_.end(), vectors_, static_cast<int32_t>(~0u >> (32 - y.pixel)));
    }
}

RowsRunner::RowsRunner(const RowsSpec& spec, RowsKernel kernel, bool sort)
    : kernel_(kernel), table_(active_table()), lanes_(table_.f32.lanes) {
  rows_ = ordered_rows(spec, sort && !kernel.emitted);
  const int64_t before = (spec.x.pad * spec.x.pitch + spec.x.pad) * spec.x.pixel;
  if (kernel_.depth)
    for (int64_t c = kernel_.depth; c < spec.x.channels; c += kernel_.depth)
      cuts_.push_back(static_cast<int32_t>(c * spec.x.channel - before));
  if (kernel_.emitted) {
    emitted_ = emit_rows(rows_, {static_cast<int>(kernel_.height), static_cast<int>(kernel_.vectors), cuts_});
    if (!emitted_ && spec.relu_in) throw std::invalid_argument("rows: a ReLU on the input takes emitted code");
    if (!emitted_) {
      rows_ = ordered_rows(spec, sort);
      kernel_.emitted = false;
      kernel_.chunk = 0;
    }
  }
  if (emitted_) {
    for (int64_t t = 0; t <= emitted_->tiles(); ++t) begins_.push_back(rows_.rows() * t / emitted_->tiles());
    return;
  }
  // Two runs are of more than kRunVectors vectors, four of four each.
  const int64_t most = table_.f32.max_vectors[0], vectors = kernel_.vectors;
  const bool two = kernel_.deep == 2 && vectors % 2 == 0 && vectors > kRunVectors && vectors <= most;
  const bool four = kernel_.deep == 4 && vectors == 16 && table_.f32.squares[0];
  if (!two && !four) {
    kernel_.vectors = std::max<int64_t>(1, vectors / kernel_.deep);
    kernel_.deep = 1;
  }
  kernel_.vectors = std::min(kernel_.vectors, most);
  begins_ = balanced(rows_, std::max<int64_t>(1, std::min<int64_t>(16, rows_.rows())));
}

void RowsRunner::run(int64_t first, int64_t last, const float* x, float* y, const float* residual, const Blocks& blocks,
                     int64_t begin, int64_t end) const {
  if (emitted_) {
    emitted_->run(first, last, x, y, residual, blocks.at(begin), blocks.stride(), end - begin);
    return;
  }
  for (int64_t b = begin; b < end; ++b)
    run_templates(begins_[first], begins_[last], x, y, residual, blocks.at(b), blocks.vectors());
}

void RowsRunner::run_templates(int64_t row, int64_t end, const float* x, float* y, const float* residual,
                               const int32_t* block, int64_t vectors) const {
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
  t.row_begin = row;
  t.row_end = end;
  t.x = x + block[0];
  t.y = y + block[1];
  t.residual = residual ? residual + block[1] : nullptr;
  if (kernel_.deep == 1) t.masks = reinterpret_cast<const uint32_t*>(block + 2);
  t.gap = t.out_gap = first_run(static_cast<int>(vectors)) * lanes_;
  if (kernel_.deep > 1) t.gap = gap_, t.out_gap = out_gap_;
  const auto& k = table_.f32;
  const auto whole = kernel_.deep == 4 ? k.squares[0] : k.spmm[kDirect][0][vectors - 1];
  const auto staged = kernel_.deep == 4 ? k.squares[1] : k.blocked[kDirect][vectors - 1];
  if (cuts_.empty()) return whole(t);
  const int64_t rows = end - row, floats = vectors * lanes_;
  t.partial = scratch_floats(kPartialScratch, rows * (floats + 1));
  t.cursors = reinterpret_cast<int32_t*>(t.partial + rows * floats);
  for (size_t stage = 0; stage <= cuts_.size(); ++stage) {
    t.first = stage == 0;
    t.last = stage == cuts_.size();
    t.limit = t.last ? INT32_MAX : cuts_[stage];
    staged(t);
  }
}

std::string RowsRunner::name() const {
  const std::string depth = cuts_.empty() ? "" : ", " + std::to_string(kernel_.depth) + " channels";
  const std::string deep = kernel_.deep > 1 ? " in " + std::to_string(kernel_.deep) + " rows" : "";
  if (!emitted_) return "spmm " + std::to_string(kernel_.vectors) + deep + depth;
  return "emitted " + std::to_string(kernel_.height) + "x" + std::to_string(kernel_.vectors) +
         (kernel_.chunk ? "/" + std::to_string(kernel_.chunk) : "") + depth;
}

}  // namespace dass
