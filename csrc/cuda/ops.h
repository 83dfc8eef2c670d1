// The ops on CUDA tensors; the schemas are in csrc/library.cpp.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace dass::cuda {

using torch::stable::Tensor;

Tensor conv2d(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, std::vector<int64_t> spec);
Tensor conv2d_dx(const Tensor& grad, const Tensor& values, const Tensor& pattern, std::vector<int64_t> spec, int64_t c,
                 int64_t h, int64_t w);
Tensor conv2d_dw(const Tensor& grad, const Tensor& x, const Tensor& pattern, std::vector<int64_t> spec, int64_t count);

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
              int64_t outputs, int64_t activation);
Tensor linear_dx(const Tensor& grad, const Tensor& values, const Tensor& pattern, int64_t inputs);
Tensor linear_dw(const Tensor& grad, const Tensor& x, const Tensor& pattern, int64_t count);

// The pattern tensor (format csr) of a bool mask [O, I] or [O, I / groups, kh, kw]. Waits for the
// device once: the pattern's size depends on the mask.
Tensor build_pattern(const Tensor& mask, int64_t groups);

}  // namespace dass::cuda
