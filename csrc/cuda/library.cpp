// Registers the CUDA kernels of the ops that csrc/library.cpp declares, and the op that only the
// device has. This library is apart from _C and loaded after it (dass_kernels/cuda_library.py).
#include <torch/csrc/stable/library.h>

#include "ops.h"

// Compute capabilities there is machine code for, as "80 86 ...".
extern "C" __attribute__((visibility("default"))) const char* dass_cuda_archs() { return DASS_CUDA_ARCHS; }

STABLE_TORCH_LIBRARY_FRAGMENT(dass, m) { m.def("build_pattern(Tensor mask, int groups) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(dass, CUDA, m) {
  m.impl("conv2d", TORCH_BOX(&dass::cuda::conv2d));
  m.impl("conv2d_dx", TORCH_BOX(&dass::cuda::conv2d_dx));
  m.impl("conv2d_dw", TORCH_BOX(&dass::cuda::conv2d_dw));
  m.impl("linear", TORCH_BOX(&dass::cuda::linear));
  m.impl("linear_dx", TORCH_BOX(&dass::cuda::linear_dx));
  m.impl("linear_dw", TORCH_BOX(&dass::cuda::linear_dw));
  m.impl("build_pattern", TORCH_BOX(&dass::cuda::build_pattern));
}
