// Sparse convolutions, and dense ones that are no depthwise convolutions, over whole pictures.
#include <algorithm>
#include <stdexcept>

#include "../cpu/isa.h"
#include "rows.h"

namespace dass {
namespace {

// Templates of fewer vectors add up several sums, and so round in another order.
constexpr int64_t kOneSum = 5;

class RowsStep : public Step {
 public:
  explicit RowsStep(const RowsSpec& s)
      : x_(s.x),
        y_(s.y),
        residual_(s.has_residual ? s.residual : Place{}),
        runner_(s, fitting(s), true),
        blocks_(runner_.vectors()),
        halves_((runner_.vectors() + 1) / 2),
        by_pixels_(s.x.channels * s.x.channel > 2 * static_cast<int64_t>(s.values.size())) {
    if (s.x.pitch != s.y.pitch && s.y.pixel == 1)
      throw std::invalid_argument("rows: input and output must have one pitch");
    if (s.y.pixel > 1 && s.y.pixel != runner_.lanes())
      throw std::invalid_argument("rows: one pixel must fill a register");
    if (s.has_residual && s.residual.pitch != s.y.pitch)
      throw std::invalid_argument("rows: residual and output must have one pitch");
    has_residual_ = s.has_residual;
    if (y_.pixel > 1) {
      blocks_.add_pixels(x_, y_, runner_.deep());
      runner_.set_gaps(x_.pitch * x_.pixel, y_.pitch * y_.pixel);
      written_ = y_.end() + y_.zeros();
      return;
    }
    const int64_t vectors = registers(y_);
    const Blocks::Flat plane{0, vectors, 0, 0, 0, y_.rows, y_.pitch, y_.columns, 0};
    blocks_.add_flat(plane, runner_.lanes());
    if (by_pixels_ && !runner_.emitted() && halves_.vectors() >= kOneSum) halves_.add_flat(plane, runner_.lanes());
    written_ = vectors * runner_.lanes();
  }

  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const float* x = pass.at(x_);
    float* y = pass.at(y_);
    const float* residual = has_residual_ ? pass.at(residual_) : nullptr;
    const auto fair = [&](const Blocks& b) { return b.count() % parts == 0 || b.count() >= 4 * parts; };
    const Blocks& blocks = !fair(blocks_) && halves_.count() > 0 && fair(halves_) ? halves_ : blocks_;
    int64_t t0 = 0, t1 = runner_.tiles(), b0 = 0, b1 = blocks.count();
    if ((by_pixels_ && fair(blocks)) || t1 < parts)
      std::tie(b0, b1) = share(b1, part, parts);
    else
      std::tie(t0, t1) = share(t1, part, parts);
    const int64_t chunk = runner_.chunk() ? runner_.chunk() : b1 - b0;
    for (int64_t b = b0; b < b1; b += chunk) runner_.run(t0, t1, x, y, residual, blocks, b, std::min(b + chunk, b1));
    const auto [first, last] = share(y_.channels, part, parts);
    zero_around(pass, y_, written_, first, last);
    if (y_.pixel > 1 && y_.zeros())
      for (int64_t c = first; c < last; ++c)
        for (int64_t row = 0; row < y_.rows; ++row)
          std::memset(y + c * y_.channel + (row * y_.pitch + y_.columns) * y_.pixel, 0, y_.zeros() * sizeof(float));
  }

  std::string kernel() const override { return runner_.name(); }

 private:
  static int64_t registers(const Place& y) {
    const int64_t lanes = active_table().f32.lanes;
    return (y.end() + lanes - 1) / lanes;
  }
  static RowsKernel fitting(const RowsSpec& s) {
    RowsKernel kernel = s.kernel;
    if (s.y.pixel == 1 || kernel.deep > s.y.rows || kernel.deep * s.y.columns < kernel.vectors)
      kernel.vectors /= kernel.deep, kernel.deep = 1;
    if (kernel.deep == 1) kernel.vectors = std::min(kernel.vectors, s.y.pixel > 1 ? s.y.columns : registers(s.y));
    return kernel;
  }

  Place x_, y_, residual_;
  RowsRunner runner_;
  Blocks blocks_, halves_;
  // Threads take pixels rather than outputs where the weights are fewer than the pixels: a layer then
  // finds most of what it reads in its own core's cache.
  bool by_pixels_;
  bool has_residual_ = false;
  int64_t written_ = 0;
};

}  // namespace

StepPtr make_rows(RowsSpec spec) { return std::make_unique<RowsStep>(spec); }

}  // namespace dass
