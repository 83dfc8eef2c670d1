// See device.h.
#include "device.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace dass::cuda {
namespace {

// A function of libtorch_cuda, which a torch without CUDA does not have. Looked up at the first call
// and not by the linker, so that the library loads there too and can say what is missing.
using CurrentStream = int32_t (*)(int32_t, void**);

CurrentStream current_stream() {
  static const auto function =
      reinterpret_cast<CurrentStream>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(function, "dass: CUDA tensors need a torch that was built with CUDA");
  return function;
}

}  // namespace

OnDevice::OnDevice(const torch::stable::Tensor& t) {
  const int32_t index = t.get_device_index();
  guard_.emplace(index);
  STD_TORCH_CHECK(current_stream()(index, &stream_) == 0, "dass: torch gave no CUDA stream");
}

}  // namespace dass::cuda
