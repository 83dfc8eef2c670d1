#include "depthwise.h"

#include <algorithm>
#include <stdexcept>

#include "../cpu/isa.h"

namespace dass {

DepthwiseRunner::DepthwiseRunner(const DepthwiseSpec& spec, bool emitted)
    : s_(spec), wanted_(emitted && spec.y.pixel == 1), zeros_(spec.y.zeros()) {
  const int64_t slot = (s_.kernel - 3) / 2, taps = s_.kernel * s_.kernel;
  if (s_.kernel % 2 == 0 || slot < 0 || slot > 2) throw std::invalid_argument("depthwise: kernel must be 3, 5 or 7");
  if (s_.y.pixel == 1 && s_.stride_w > 2) throw std::invalid_argument("depthwise: stride must be 1 or 2");
  fn_ = active_table().dense->depthwise[slot];
  for (int64_t c = 0; c < s_.y.channels; ++c) {
    offsets_.push_back(static_cast<int32_t>(c * s_.x.channel));
    packed_.insert(packed_.end(), s_.weights.begin() + c * taps, s_.weights.begin() + (c + 1) * taps);
    packed_.push_back(s_.bias[c]);
  }
}

void DepthwiseRunner::prepare(int64_t rows) {
  if (!wanted_ || emitted_.count(rows)) return;
  EmitWindow g{};
  g.op = kWeighted;
  g.kernel_h = g.kernel_w = s_.kernel;
  g.weights = s_.kernel * s_.kernel + 1;
  g.relu_in = s_.relu_in;
  g.stride = s_.stride_w;
  g.rows = rows;
  g.columns = s_.y.columns;
  g.tap_row = s_.dilation_h * s_.x.pitch;
  g.tap_column = s_.dilation_w;
  g.stride_row = s_.stride_h * s_.x.pitch;
  g.y_channel = s_.y.channel;
  g.pitch = s_.y.pitch;
  g.zeros = zeros_;
  g.activation = s_.activation;
  auto code = emit_window(g);
  if (!code && s_.relu_in) throw std::invalid_argument("depthwise: a ReLU on the input takes emitted code");
  emitted_[rows] = std::move(code);
}

void DepthwiseRunner::run(const float* x, float* y, int64_t first, int64_t last, int64_t rows, int64_t zeros) const {
  const int64_t taps = s_.kernel * s_.kernel, pixel = s_.x.pixel;
  const auto code = emitted_.find(rows);
  if (code != emitted_.end() && code->second && zeros == zeros_) {
    code->second->run({x, y, nullptr, packed_.data() + first * (taps + 1), nullptr, offsets_.data(), last - first});
    return;
  }
  DepthwiseArgs a{};
  a.x = {x, s_.x.channel, s_.x.pitch * pixel};
  a.y = {y, s_.y.channel, s_.y.pitch * pixel, last - first, rows, s_.y.columns, pixel, zeros};
  a.weights = s_.weights.data() + first * taps;
  a.bias = s_.bias.data() + first;
  a.tap_row = s_.dilation_h * s_.x.pitch * pixel;
  a.tap_column = s_.dilation_w * pixel;
  a.stride_row = s_.stride_h * s_.x.pitch * pixel;
  a.stride = s_.stride_w;
  a.activation = s_.activation;
  fn_(a);
}

std::string DepthwiseRunner::name() const {
  const bool emitted = std::any_of(emitted_.begin(), emitted_.end(), [](const auto& e) { return e.second != nullptr; });
  return std::string(emitted ? "emitted " : "") + "depthwise " + std::to_string(s_.kernel);
}

}  // namespace dass
