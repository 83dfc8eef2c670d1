// [1x1 ->] depthwise [-> 1x1], depth first: a strip of rows at a time, so that what lies between the
// convolutions never leaves the cache. Rows at the border of a strip are computed twice.
#include <algorithm>
#include <stdexcept>

#include "../cpu/isa.h"
#include "depthwise.h"
#include "rows.h"

namespace dass {
namespace {

constexpr int64_t kLine = 16;

int64_t floor_line(int64_t v) { return (v >= 0 ? v : v - kLine + 1) / kLine * kLine; }
int64_t ceil_line(int64_t v) { return floor_line(v + kLine - 1); }

// Outputs [row, end) of the depthwise convolution; its inputs [from, to), of which those inside the
// picture are computed. In the scratch plane element e of the input lies at e - base.
struct Strip {
  int64_t row, end, from, to, base;
  Blocks expand, project;
};

class FusedStep : public Step {
 public:
  explicit FusedStep(FusedSpec s) : s_(std::move(s)), depthwise_(s_.depthwise, s_.depthwise.emitted) {
    if (s_.depthwise.x.pixel != 1) throw std::invalid_argument("fused: planes of one image only");
    const DepthwiseSpec& d = s_.depthwise;
    if (s_.has_project && s_.strip < d.y.rows && s_.strip * d.y.pitch % kLine)
      throw std::invalid_argument("fused: strips must be whole lines");
    if (s_.has_expand) expand_ = std::make_unique<RowsRunner>(s_.expand, s_.expand.kernel, false);
    if (s_.has_project) {
      // What a block writes past its strip would be another channel's.
      const int64_t lanes = active_table().f32.lanes, rows = (d.y.rows - 1) % s_.strip + 1;
      const int64_t least = ((rows - 1) * d.y.pitch + d.y.columns + lanes - 1) / lanes;
      s_.project.kernel.vectors = std::min(s_.project.kernel.vectors, least);
      project_ = std::make_unique<RowsRunner>(s_.project, s_.project.kernel, true);
    }
    for (int64_t row = 0; row < d.y.rows; row += s_.strip) {
      strips_.push_back(make_strip(row));
      depthwise_.prepare(strips_.back().end - row);
    }
    if (expand_)
      for (int64_t t = 0; t < expand_->tiles(); ++t)
        tallest_ = std::max(tallest_, expand_->rows_of(t).second - expand_->rows_of(t).first);
  }

  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const Place& y = s_.has_project ? s_.project.y : s_.depthwise.y;
    const int64_t tiles = expand_ ? expand_->tiles() : std::min<int64_t>(8, s_.depthwise.y.channels);
    const int64_t count = static_cast<int64_t>(strips_.size());
    if (project_) {
      const auto [first, last] = share(count, part, parts);
      for (int64_t i = first; i < last; ++i) {
        hidden(pass, strips_[i], 0, tiles, tiles);
        finish(pass, strips_[i]);
      }
    } else {
      const auto [first, last] = share(count * tiles, part, parts);
      for (int64_t i = first; i < last; ++i) hidden(pass, strips_[i / tiles], i % tiles, i % tiles + 1, tiles);
    }
    const auto [first, last] = share(y.channels, part, parts);
    const int64_t lanes = active_table().f32.lanes;
    const int64_t flat = (y.end() + lanes - 1) / lanes * lanes;
    zero_around(pass, y, project_ ? flat : y.end() + y.zeros(), first, last);
  }

  std::string kernel() const override {
    std::string name;
    if (expand_) name += expand_->name() + " > ";
    name += depthwise_.name();
    if (project_) name += " > " + project_->name();
    return name + ", strips of " + std::to_string(s_.strip);
  }

 private:
  Strip make_strip(int64_t row) const {
    const DepthwiseSpec& d = s_.depthwise;
    Strip strip{row,
                std::min(row + s_.strip, d.y.rows),
                0,
                0,
                0,
                Blocks(expand_ ? expand_->vectors() : 1),
                Blocks(project_ ? project_->vectors() : 1)};
    strip.from = row * d.stride_h - d.top;
    strip.to = (strip.end - 1) * d.stride_h - d.top + (d.kernel - 1) * d.dilation_h + 1;
    const int64_t pitch = d.x.pitch;
    strip.base = floor_line(strip.from * pitch - d.left);
    if (expand_) {
      const int64_t lanes = expand_->lanes(), begin = std::max<int64_t>(0, strip.base);
      const int64_t end = std::min(strip.to, d.x.rows) * pitch;  // with the zeros behind its last row
      strip.expand.add_flat(
          {begin / lanes, (end + lanes - 1) / lanes, 0, -strip.base, 0, d.x.rows, pitch, d.x.columns, 0}, lanes);
    }
    if (project_) {
      const int64_t lanes = project_->lanes(), rows = strip.end - row;
      // Zeros right of its last row, too; those behind the picture are written apart.
      const int64_t end = (rows - 1) * d.y.pitch + (strip.end < d.y.rows ? d.y.pitch : d.y.columns);
      strip.project.add_flat({0, (end + lanes - 1) / lanes, 0, row * d.y.pitch, 0, rows, d.y.pitch, d.y.columns, 0},
                             lanes);
    }
    return strip;
  }

  // The depthwise convolution's outputs of some tiles of channels.
  void hidden(const Pass& pass, const Strip& strip, int64_t first, int64_t last, int64_t tiles) const {
    const DepthwiseSpec& d = s_.depthwise;
    for (int64_t t = first; t < last; ++t) {
      const auto [c0, c1] = expand_ ? expand_->rows_of(t) : share(d.y.channels, t, tiles);
      const float* x = pass.at(d.x);
      if (expand_) {
        float* scratch = scratch_floats(kHiddenScratch, tallest_ * d.x.channel);
        expand_->run(t, t + 1, pass.at(s_.expand.x), scratch - c0 * d.x.channel, nullptr, strip.expand, 0,
                     strip.expand.count());
        zero_outside(strip, scratch, c1 - c0);
        x = scratch - strip.base;
      } else {
        x += c0 * d.x.channel;
      }
      x += strip.from * d.x.pitch - d.left;
      float* y =
          project_ ? scratch_floats(kStripScratch, d.y.channels * d.y.channel) : pass.at(d.y) + strip.row * d.y.pitch;
      depthwise_.run(x, y + c0 * d.y.channel, c0, c1, strip.end - strip.row, d.y.zeros());
    }
  }

  // Rows of zeros above and below the picture, and what lies right of the last row that is computed.
  void zero_outside(const Strip& strip, float* scratch, int64_t channels) const {
    const Place& x = s_.depthwise.x;
    const int64_t lanes = expand_->lanes();
    const int64_t end = std::min(strip.to, x.rows) * x.pitch;
    const int64_t done = (end + lanes - 1) / lanes * lanes - strip.base;
    const int64_t all = ceil_line(strip.to * x.pitch - strip.base);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < -strip.base; ++i) scratch[c * x.channel + i] = 0.0f;
      for (int64_t i = done; i < all; ++i) scratch[c * x.channel + i] = 0.0f;
    }
  }

  void finish(const Pass& pass, const Strip& strip) const {
    const float* residual = s_.project.has_residual ? pass.at(s_.project.residual) : nullptr;
    const float* x = scratch_floats(kStripScratch, s_.depthwise.y.channels * s_.depthwise.y.channel);
    const int64_t count = strip.project.count(), chunk = project_->chunk() ? project_->chunk() : count;
    for (int64_t b = 0; b < count; b += chunk)
      project_->run(0, project_->tiles(), x, pass.at(s_.project.y), residual, strip.project, b,
                    std::min(b + chunk, count));
  }

  FusedSpec s_;
  DepthwiseRunner depthwise_;
  std::unique_ptr<RowsRunner> expand_, project_;
  std::vector<Strip> strips_;
  int64_t tallest_ = 0;
};

}  // namespace

StepPtr make_fused(FusedSpec spec) { return std::make_unique<FusedStep>(std::move(spec)); }

}  // namespace dass
