// In torch's place for tests/native: the functions that csrc/ops calls.
#pragma once
#include <algorithm>

#include "tensor.h"

namespace torch::stable {

inline int& threads() {
  static int count = 1;
  return count;
}
inline int get_num_threads() { return threads(); }

// As many pieces as there are threads, one after the other: what is checked is how work is divided.
template <class Fn>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Fn& fn) {
  const int64_t piece = std::max(grain, (end - begin + threads() - 1) / threads());
  for (int64_t at = begin; at < end; at += piece) fn(at, std::min(end, at + piece));
}

inline Tensor contiguous(const Tensor& t) { return t; }

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> sizes) {
  return like.scalar_type() == ScalarType::Float ? Tensor::make(std::move(sizes), static_cast<float*>(nullptr))
                                                 : Tensor::make(std::move(sizes), static_cast<double*>(nullptr));
}

inline Tensor new_zeros(const Tensor& like, std::vector<int64_t> sizes) {
  Tensor t = new_empty(like, std::move(sizes));
  std::memset(t.mutable_data_ptr(), 0, t.numel() * (t.scalar_type() == ScalarType::Float ? 4 : 8));
  return t;
}

}  // namespace torch::stable
