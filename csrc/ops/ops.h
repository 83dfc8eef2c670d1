// The ops that library.cpp registers.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace dass {

using torch::stable::Tensor;

Tensor conv2d(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, std::vector<int64_t> spec);
Tensor conv2d_lanes(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
                    std::vector<int64_t> spec);
Tensor conv2d_dx(const Tensor& grad, const Tensor& values, const Tensor& pattern, std::vector<int64_t> spec, int64_t c,
                 int64_t h, int64_t w);
Tensor conv2d_dw(const Tensor& grad, const Tensor& x, const Tensor& pattern, std::vector<int64_t> spec, int64_t count);

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
              int64_t outputs, int64_t activation);
Tensor linear_dx(const Tensor& grad, const Tensor& values, const Tensor& pattern, int64_t inputs);
Tensor linear_dw(const Tensor& grad, const Tensor& x, const Tensor& pattern, int64_t count);

}  // namespace dass
