// Argument checks of the CUDA ops: each names the argument, what was expected and what came.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "kernels.h"

namespace dass::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Dtype dtype_of(const Tensor& t, const char* op) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half, op,
                  ": float32 or float16 expected on CUDA, got dtype code ", static_cast<int>(dtype));
  return dtype == ScalarType::Float ? Dtype::kFloat : Dtype::kHalf;
}

inline void check_device(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), op, ": ", name,
                  " must be on the device of the input");
}

inline void check_like(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of the input (code ",
                  static_cast<int>(x.scalar_type()), "), got code ", static_cast<int>(t.scalar_type()));
  check_device(t, x, op, name);
}

inline void check_2d(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " must have 2 dimensions (batch, features), got ", t.dim());
}

inline void check_pattern(const Tensor& pattern, const Tensor& x, const char* op) {
  dtype_of(x, op);
  STD_TORCH_CHECK(pattern.scalar_type() == ScalarType::Int && pattern.dim() == 1 && pattern.is_contiguous(), op,
                  ": pattern must be a contiguous int32 vector made by dass_kernels.pack");
  check_device(pattern, x, op, "pattern");
}

inline void check_weight(const Tensor& values, const Tensor& pattern, const Tensor& x, const char* op) {
  check_pattern(pattern, x, op);
  check_like(values, x, op, "values");
  STD_TORCH_CHECK(values.dim() == 1, op, ": values must be a vector, got ", values.dim(), " dimensions");
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t outputs, const Tensor& x, const char* op) {
  if (!bias) return;
  check_like(*bias, x, op, "bias");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs, op, ": bias must have ", outputs,
                  " elements, one per output");
}

inline Activation check_activation(int64_t code, const char* op) {
  STD_TORCH_CHECK(code >= kNone && code <= kHardswish, op, ": unknown activation code ", code);
  return static_cast<Activation>(code);
}

}  // namespace dass::cuda
