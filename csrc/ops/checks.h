// Argument checks shared by the ops: each names the argument, what was expected and what came.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <initializer_list>
#include <optional>

#include "../cpu/isa.h"
#include "pattern.h"

namespace dass {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline void check_float(const Tensor& t, ScalarType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                  ": float32 or float64 expected, got dtype code ", static_cast<int>(dtype));
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype of the input (code ",
                  static_cast<int>(dtype), "), got code ", static_cast<int>(t.scalar_type()));
}

inline void check_values(const Tensor& values, const Pattern& p, ScalarType dtype, const char* op) {
  check_float(values, dtype, op, "values");
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == p.value_count(), op, ": values must be a vector of ",
                  p.value_count(), " elements, as the pattern stores");
}

inline void check_bias(const std::optional<Tensor>& bias, const Pattern& p, ScalarType dtype, const char* op) {
  if (!bias) return;
  check_float(*bias, dtype, op, "bias");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.outputs, op, ": bias must have ", p.outputs,
                  " elements, one per output");
}

inline Activation check_activation(int64_t code, const char* op) {
  STD_TORCH_CHECK(code >= kNone && code <= kHardswish, op, ": unknown activation code ", code);
  return static_cast<Activation>(code);
}

// A fresh output. glibc maps blocks past 32 MiB anew each time, and touching those 4 KiB by 4 KiB costs
// more than a sparse kernel does (64 MiB: 20 ms, with huge pages 3.5 ms).
inline Tensor new_output(const Tensor& like, std::initializer_list<int64_t> size) {
  Tensor t = torch::stable::new_empty(like, size);
#if defined(__linux__)
  constexpr int64_t kMapped = 32 << 20, kPage = 4096;
  const int64_t bytes = t.numel() * (t.scalar_type() == ScalarType::Double ? 8 : 4);
  if (bytes >= kMapped) {
    const auto begin = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), (bytes - kPage) / kPage * kPage, MADV_HUGEPAGE);
  }
#endif
  return t;
}

// Runs fn with a null pointer of the element type as its tag.
template <class Fn>
void by_dtype(ScalarType dtype, Fn&& fn) {
  if (dtype == ScalarType::Float)
    fn(static_cast<float*>(nullptr));
  else
    fn(static_cast<double*>(nullptr));
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
Matrix<T> weight_matrix(const Pattern& p, const T* values) {
  return {values, p.indices, p.indptr, p.block, p.block_rows(), p.outputs, p.columns, p.taps, p.groups};
}

// The transpose, with its values gathered into scratch that lives until the next call.
template <class T>
Matrix<T> transposed_matrix(const Pattern& p, const T* values, T* gathered) {
  for (int64_t i = 0; i < p.elements; ++i) gathered[i] = values[p.perm[i]];
  return {gathered, p.t_indices, p.t_indptr, 1, p.channels(), p.channels(), p.outputs / p.groups * p.taps,
          p.taps,   p.groups};
}

}  // namespace dass
