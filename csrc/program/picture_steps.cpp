// Dense steps: depthwise convolutions, pooling, element by element, means, linear layers, conversions.
#include <algorithm>
#include <stdexcept>

#include "../cpu/isa.h"
#include "depthwise.h"
#include "step.h"

namespace dass {
namespace {

Picture picture(const Pass& pass, const Place& p, int64_t first) {
  return {pass.at(p) + first * p.channel, p.channel, p.pitch * p.pixel};
}

// Row pitches are in floats for the kernels.
PlanesOut rows_out(const Pass& pass, const Place& p, int64_t first, int64_t last) {
  PlanesOut out = planes_out(pass, p, first, last);
  out.pitch *= p.pixel;
  return out;
}

// Floats of a plane that a kernel which goes row by row has written, zeros right of the last row too.
int64_t written(const Place& p) { return p.end() + p.zeros(); }

class DepthwiseStep : public Step {
 public:
  explicit DepthwiseStep(DepthwiseSpec s) : s_(std::move(s)), runner_(s_, s_.emitted) {
    if (s_.x.pad < std::max(s_.top, s_.left)) throw std::invalid_argument("depthwise: too few zeros around x");
    for (int64_t rows : {s_.y.rows, s_.y.rows / 2, (s_.y.rows + 1) / 2})
      if (rows > 0) runner_.prepare(rows);
  }
  // Two threads take rows of the picture each, as those of the products around do.
  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const auto [first, last] = share(s_.y.channels, part, parts);
    const int64_t corner = (s_.top * s_.x.pitch + s_.left) * s_.x.pixel;
    const float* x = pass.at(s_.x) - corner;
    if (const auto [row, end] = share(s_.y.rows, part, parts); parts == 2 && row < end && runner_.prepared(end - row))
      runner_.run(x + row * s_.stride_h * s_.x.pitch * s_.x.pixel, pass.at(s_.y) + row * s_.y.pitch * s_.y.pixel, 0,
                  s_.y.channels, end - row, s_.y.zeros());
    else
      runner_.run(x + first * s_.x.channel, pass.at(s_.y) + first * s_.y.channel, first, last, s_.y.rows, s_.y.zeros());
    zero_around(pass, s_.y, written(s_.y), first, last);
  }
  std::string kernel() const override { return runner_.name(); }

 private:
  DepthwiseSpec s_;
  DepthwiseRunner runner_;
};

class PoolStep : public Step {
 public:
  explicit PoolStep(PoolSpec s) : s_(std::move(s)), fn_(active_table().dense->pool) {
    const auto shares = [&](int64_t outputs, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad,
                            int64_t size) {
      std::vector<float> out;
      for (int64_t o = 0; o < outputs; ++o) {
        int64_t inside = 0;
        for (int64_t k = 0; k < kernel; ++k) {
          const int64_t at = o * stride - pad + k * dilation;
          inside += s_.count_padding || (at >= 0 && at < size);
        }
        out.push_back(1.0f / static_cast<float>(inside));
      }
      return out;
    };
    by_row_ = shares(s_.y.rows, s_.kernel_h, s_.stride_h, s_.dilation_h, s_.top, s_.x.rows);
    for (float f : shares(s_.y.columns, s_.kernel_w, s_.stride_w, s_.dilation_w, s_.left, s_.x.columns))
      by_column_.insert(by_column_.end(), s_.y.pixel, f);
    by_column_.resize(by_column_.size() + 16);
    emit();
    const int64_t wide = (s_.y.columns + 16) * s_.stride_w + s_.kernel_w * s_.dilation_w;
    scratch_ = (std::max(wide, s_.left + s_.x.columns) + s_.right) * s_.y.pixel + 64;
  }
  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const auto [first, last] = share(s_.y.channels, part, parts);
    if (code_) {
      const int64_t corner = s_.top * s_.x.pitch + s_.left;
      code_->run({pass.at(s_.x) + first * s_.x.channel - corner, pass.at(s_.y) + first * s_.y.channel,
                  s_.has_residual ? pass.at(s_.residual) + first * s_.residual.channel : nullptr,
                  packed_.data() + 2 * first, shares_.data(), offsets_.data(), last - first});
      zero_around(pass, s_.y, written(s_.y), first, last);
      return;
    }
    PoolArgs a{};
    a.x = picture(pass, s_.x, first);
    a.y = rows_out(pass, s_.y, first, last);
    a.in_rows = s_.x.rows;
    a.in_columns = s_.x.columns;
    a.kernel_h = s_.kernel_h;
    a.kernel_w = s_.kernel_w;
    a.stride_h = s_.stride_h;
    a.stride_w = s_.stride_w;
    a.top = s_.top;
    a.left = s_.left;
    a.dilation_h = s_.dilation_h;
    a.dilation_w = s_.dilation_w;
    a.maximum = s_.maximum;
    a.by_row = by_row_.data();
    a.by_column = by_column_.data();
    a.scale = s_.scale.empty() ? nullptr : s_.scale.data() + first;
    a.bias = s_.bias.empty() ? nullptr : s_.bias.data() + first;
    a.scratch = scratch_floats(kHiddenScratch, scratch_);
    a.scratch_floats = scratch_;
    a.activation = s_.activation;
    fn_(a);
    zero_around(pass, s_.y, written(s_.y), first, last);
  }
  std::string kernel() const override {
    return std::string(code_ ? "emitted " : "") + (s_.maximum ? "pool max" : "pool avg");
  }

 private:
  void emit() {
    EmitWindow g{};
    g.op = s_.maximum ? kMaximum : kMean;
    g.kernel_h = s_.kernel_h;
    g.kernel_w = s_.kernel_w;
    g.stride = s_.stride_w;
    g.rows = s_.y.rows;
    g.columns = s_.y.columns;
    g.tap_row = s_.dilation_h * s_.x.pitch;
    g.tap_column = s_.dilation_w;
    g.stride_row = s_.stride_h * s_.x.pitch;
    g.y_channel = s_.y.channel;
    g.pitch = s_.y.pitch;
    g.zeros = s_.y.zeros();
    g.activation = s_.activation;
    g.scaled = !s_.scale.empty() || !s_.bias.empty();
    g.weights = 2;
    g.relu_in = s_.relu_in;
    g.residual = s_.has_residual;
    g.residual_channel = s_.residual.channel;
    g.residual_pitch = s_.residual.pitch;
    // A mean may add the zeros that lie around its input.
    const int64_t down = (s_.y.rows - 1) * s_.stride_h + (s_.kernel_h - 1) * s_.dilation_h - s_.top - s_.x.rows + 1;
    const int64_t right = (s_.y.columns - 1) * s_.stride_w + (s_.kernel_w - 1) * s_.dilation_w - s_.left;
    const int64_t reach = std::max({s_.top, s_.left, down, right - s_.x.columns + 1});
    if (s_.maximum || s_.x.pad < reach) g.in_rows = s_.x.rows, g.in_columns = s_.x.columns;
    g.top = s_.top;
    g.left = s_.left;
    g.stride_h = s_.stride_h;
    g.dilation_h = s_.dilation_h;
    g.dilation_w = s_.dilation_w;
    if (s_.y.pixel == 1 && s_.x.space == 0) code_ = emit_window(g);
    if (!code_ && (s_.relu_in || s_.has_residual))
      throw std::invalid_argument("pool: a ReLU on the input and a residual take emitted code");
    for (int64_t c = 0; c < s_.y.channels; ++c) {
      packed_.push_back(s_.scale.empty() ? 1.0f : s_.scale[c]);
      packed_.push_back(s_.bias.empty() ? 0.0f : s_.bias[c]);
      offsets_.push_back(static_cast<int32_t>(c * s_.x.channel));
    }
    const int64_t wide = (s_.y.columns + 15) / 16 * 16;
    for (int64_t row = 0; row < s_.y.rows && !s_.maximum; ++row)
      for (int64_t x = 0; x < wide; ++x) shares_.push_back(x < s_.y.columns ? by_row_[row] * by_column_[x] : 0.0f);
  }

  PoolSpec s_;
  void (*fn_)(const PoolArgs&);
  std::vector<float> by_row_, by_column_, packed_, shares_;
  std::vector<int32_t> offsets_;
  std::unique_ptr<EmittedWindow> code_;
  int64_t scratch_;
};

class MapStep : public Step {
 public:
  explicit MapStep(MapSpec s) : s_(std::move(s)), fn_(active_table().dense->map) { emit(); }
  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const auto [first, last] = share(s_.y.channels, part, parts);
    if (code_) {
      code_->run({pass.at(s_.x), pass.at(s_.y) + first * s_.y.channel,
                  s_.combine == kAdd ? pass.at(s_.other) + first * s_.other.channel : nullptr,
                  packed_.data() + 2 * first, nullptr, offsets_.data() + first, last - first});
      zero_around(pass, s_.y, written(s_.y), first, last);
      return;
    }
    MapArgs a{};
    a.stride = s_.stride_w;
    a.combine = s_.combine;
    a.activation = s_.activation;
    const bool apart = !s_.channels.empty();
    for (int64_t c = first; c < last;) {
      const int64_t end = apart ? c + 1 : last, dy = shift(s_.shift_h, c), dx = shift(s_.shift_w, c);
      a.x = picture(pass, s_.x, apart ? s_.channels[c] : c);
      a.x.data += dy * a.x.pitch + dx * s_.x.pixel;
      a.x.pitch *= s_.stride_h;
      if (s_.combine != kCopy) a.other = picture(pass, s_.other, c);
      if (s_.combine == kMulChannel) a.other.pitch = 0;
      a.y = rows_out(pass, s_.y, c, end);
      a.in_rows = std::min(s_.y.rows, (s_.x.rows - dy + s_.stride_h - 1) / s_.stride_h);
      a.in_columns = std::min(s_.y.columns, (s_.x.columns - dx + s_.stride_w - 1) / s_.stride_w);
      a.scale = s_.scale.empty() ? nullptr : s_.scale.data() + c;
      a.bias = s_.bias.empty() ? nullptr : s_.bias.data() + c;
      fn_(a);
      c = end;
    }
    zero_around(pass, s_.y, written(s_.y), first, last);
  }
  std::string kernel() const override {
    const char* names[] = {"copy", "add", "mul", "mul"};
    return std::string(code_ ? "emitted " : "") + names[s_.combine];
  }

 private:
  // Where all channels are read from the same corner of their planes up to a shift of some pixels,
  // those that fall off the picture included, code is made for one of them.
  void emit() {
    const int64_t channels = s_.y.channels;
    if (s_.y.pixel > 1 || channels == 0 || s_.combine == kMul || s_.combine == kMulChannel) return;
    EmitWindow g{};
    g.op = kWeighted;
    g.kernel_h = g.kernel_w = 1;
    g.stride = s_.stride_w;
    g.rows = s_.y.rows;
    g.columns = s_.y.columns;
    g.tap_column = 1;
    g.tap_row = s_.x.pitch;
    g.stride_row = s_.stride_h * s_.x.pitch;
    g.y_channel = s_.y.channel;
    g.pitch = s_.y.pitch;
    g.zeros = s_.y.zeros();
    g.activation = s_.activation;
    g.scaled = !s_.scale.empty() || !s_.bias.empty();
    g.weights = 2;
    g.residual = s_.combine == kAdd;
    g.residual_channel = s_.other.channel;
    g.residual_pitch = s_.other.pitch;
    g.exact = s_.x.space != 0;
    g.in_rows = s_.x.rows;
    g.in_columns = s_.x.columns;
    g.stride_h = s_.stride_h;
    g.dilation_h = g.dilation_w = 1;
    if (is_flat(g)) flatten(g);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t dy = shift(s_.shift_h, c), dx = shift(s_.shift_w, c);
      // Phases that end early differ in their borders: such pictures are left to the kernel.
      if ((dy || dx) && (s_.x.rows % s_.stride_h || s_.x.columns % s_.stride_w)) return;
      if (dy >= s_.stride_h || dx >= s_.stride_w || dy < 0 || dx < 0) return;
      offsets_.push_back(
          static_cast<int32_t>((s_.channels.empty() ? c : s_.channels[c]) * s_.x.channel + dy * s_.x.pitch + dx));
      packed_.push_back(s_.scale.empty() ? 1.0f : s_.scale[c]);
      packed_.push_back(s_.bias.empty() ? 0.0f : s_.bias[c]);
    }
    code_ = emit_window(g);
  }

  // Whether zeros between rows come of zeros, so that a plane is as good as one long row.
  bool is_flat(const EmitWindow& g) const {
    const auto like_y = [&](const Place& p) {
      return p.space == 0 && p.pixel == 1 && p.pitch == s_.y.pitch && p.pad >= s_.y.pad;
    };
    // The last register must not reach into the next plane.
    const bool room = (s_.y.end() + lanes() - 1) / lanes() * lanes() <= s_.y.channel;
    const bool moved = !s_.shift_h.empty() || !s_.shift_w.empty() || s_.stride_h > 1 || s_.stride_w > 1;
    return room && !moved && !g.scaled && s_.y.space == 0 && like_y(s_.x) && (!g.residual || like_y(s_.other));
  }
  static int64_t lanes() { return active_table().f32.lanes; }
  // One register after the other.
  void flatten(EmitWindow& g) const {
    g.rows = (s_.y.end() + lanes() - 1) / lanes();
    g.columns = g.pitch = g.tap_row = g.stride_row = g.residual_pitch = lanes();
    g.zeros = g.in_rows = g.in_columns = 0;
  }

  static int64_t shift(const std::vector<int32_t>& shifts, int64_t c) { return shifts.empty() ? 0 : shifts[c]; }
  MapSpec s_;
  void (*fn_)(const MapArgs&);
  std::vector<float> packed_;
  std::vector<int32_t> offsets_;
  std::unique_ptr<EmittedWindow> code_;
};

class MeanStep : public Step {
 public:
  MeanStep(Place x, Place y) : x_(x), y_(y), fn_(active_table().dense->mean) {}
  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const auto [first, last] = share(x_.channels, part, parts);
    fn_({picture(pass, x_, first), pass.at(y_) + first * x_.pixel, last - first, x_.rows, x_.columns, x_.pixel});
  }
  std::string kernel() const override { return "mean"; }

 private:
  Place x_, y_;
  void (*fn_)(const MeanArgs&);
};

class GemvStep : public Step {
 public:
  explicit GemvStep(GemvSpec s) : s_(std::move(s)), table_(active_table()) {
    outputs_ = static_cast<int64_t>(s_.bias.size());
    inputs_ = s_.weights.size() / std::max<int64_t>(1, outputs_);
    if (!s_.sparse) return;
    if (!is_simple(s_.activation)) throw std::invalid_argument("gemv: no sparse kernel for this activation");
    if (!table_.f32.gemv) throw std::invalid_argument("gemv: no sparse kernel for this instruction set");
    words_ = (inputs_ + 15) / 16;
    indptr_.push_back(0);
    bits_.assign(outputs_ * words_, 0);
    for (int64_t r = 0; r < outputs_; ++r) {
      for (int64_t k = 0; k < inputs_; ++k)
        if (const float w = s_.weights[r * inputs_ + k]) {
          bits_[r * words_ + k / 16] |= static_cast<uint16_t>(1u << k % 16);
          values_.push_back(w);
        }
      indptr_.push_back(static_cast<int32_t>(values_.size()));
    }
    values_.resize(values_.size() + 16);
    s_.weights.clear();
  }
  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const auto [first, last] = share(outputs_, part, parts);
    if (!s_.sparse) {
      const float* w = s_.weights.data();
      table_.dense->gemv({pass.at(s_.x), w, s_.bias.data(), pass.at(s_.y), first, last, inputs_, s_.activation});
      return;
    }
    GemvTile<float> t{};
    t.x = pass.at(s_.x);
    t.values = values_.data();
    t.indptr = indptr_.data();
    t.bits = bits_.data();
    t.words = words_;
    t.row_begin = first;
    t.row_end = last;
    t.y = pass.at(s_.y);
    t.bias = s_.bias.data();
    t.activation = s_.activation;
    table_.f32.gemv(t);
  }
  std::string kernel() const override { return s_.sparse ? "gemv bits" : "gemv dense"; }

 private:
  GemvSpec s_;
  const KernelTable& table_;
  int64_t outputs_, inputs_, words_ = 0;
  std::vector<float> values_;
  std::vector<int32_t> indptr_;
  std::vector<uint16_t> bits_;
};

// Rows of a tensor [images, C, H, W], the images apart, to or from pixels of as many lanes.
class TurnStep : public Step {
 public:
  TurnStep(Place x, Place y, bool in) : x_(x), y_(y), in_(in), fn_(active_table().f32.transpose) {}
  void run(const Pass& pass, int64_t part, int64_t parts) const override {
    const Place& tensor = in_ ? x_ : y_;
    const Place& lanes = in_ ? y_ : x_;
    const auto [first, last] = share(tensor.channels, part, parts);
    const int64_t apart = pass.images_apart[tensor.space - 1];
    for (int64_t c = first; c < last; ++c)
      for (int64_t row = 0; row < tensor.rows; ++row) {
        float* t = pass.at(tensor) + c * tensor.channel + row * tensor.pitch;
        float* l = pass.at(lanes) + c * lanes.channel + row * lanes.pitch * lanes.pixel;
        if (in_) {
          fn_(t, apart, l, lanes.pixel, pass.images, tensor.columns);
          std::memset(l + tensor.columns * lanes.pixel, 0, lanes.zeros() * sizeof(float));
        } else {
          fn_(l, lanes.pixel, t, apart, tensor.columns, pass.images);
        }
      }
    if (in_) zero_around(pass, y_, written(y_), first, last);
  }
  std::string kernel() const override { return in_ ? "gather" : "scatter"; }

 private:
  Place x_, y_;
  bool in_;
  TransposeFn<float> fn_;
};

}  // namespace

StepPtr make_depthwise(DepthwiseSpec s) { return std::make_unique<DepthwiseStep>(std::move(s)); }
StepPtr make_pool(PoolSpec s) { return std::make_unique<PoolStep>(std::move(s)); }
StepPtr make_map(MapSpec s) { return std::make_unique<MapStep>(std::move(s)); }
StepPtr make_mean(Place x, Place y) { return std::make_unique<MeanStep>(x, y); }
StepPtr make_gemv(GemvSpec s) { return std::make_unique<GemvStep>(std::move(s)); }
StepPtr make_gather(Place x, Place y) { return std::make_unique<TurnStep>(x, y, true); }
StepPtr make_scatter(Place x, Place y) { return std::make_unique<TurnStep>(x, y, false); }

}  // namespace dass
