// The device a tensor lies on, and its current stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace dass::cuda {

// Makes the tensor's device the current one until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t);
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace dass::cuda
