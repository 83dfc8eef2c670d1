// The CUDA ops on CPU tensors, as torch.ops.dass_emulated.*: the sources of csrc/cuda, run by fibers.
#include <torch/csrc/stable/library.h>

#include "block.h"
#include "cuda/ops.h"

STABLE_TORCH_LIBRARY(dass_emulated, m) {
  m.def("conv2d(Tensor x, Tensor values, Tensor pattern, Tensor? bias, Tensor? residual, int[] spec) -> Tensor");
  m.def("conv2d_dx(Tensor grad, Tensor values, Tensor pattern, int[] spec, SymInt c, SymInt h, SymInt w) -> Tensor");
  m.def("conv2d_dw(Tensor grad, Tensor x, Tensor pattern, int[] spec, SymInt count) -> Tensor");
  m.def("linear(Tensor x, Tensor values, Tensor pattern, Tensor? bias, int outputs, int activation) -> Tensor");
  m.def("linear_dx(Tensor grad, Tensor values, Tensor pattern, int inputs) -> Tensor");
  m.def("linear_dw(Tensor grad, Tensor x, Tensor pattern, SymInt count) -> Tensor");
  m.def("build_pattern(Tensor mask, int groups) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dass_emulated, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&dass::cuda::conv2d));
  m.impl("conv2d_dx", TORCH_BOX(&dass::cuda::conv2d_dx));
  m.impl("conv2d_dw", TORCH_BOX(&dass::cuda::conv2d_dw));
  m.impl("linear", TORCH_BOX(&dass::cuda::linear));
  m.impl("linear_dx", TORCH_BOX(&dass::cuda::linear_dx));
  m.impl("linear_dw", TORCH_BOX(&dass::cuda::linear_dw));
  m.impl("build_pattern", TORCH_BOX(&dass::cuda::build_pattern));
}

extern "C" __attribute__((visibility("default"))) void shim_seed(uint64_t seed) { shim::Block::get().seed = seed; }
extern "C" __attribute__((visibility("default"))) int64_t shim_launches() { return shim::Block::get().launches; }
