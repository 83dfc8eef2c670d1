// Every op of the library, and the pybind11 module for what is not a tensor op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/dense.h"
#include "cpu/isa.h"
#include "ops/ops.h"
#include "program/bind.h"

// `pattern` is the int32 tensor that dass_kernels.pack builds: indices, transpose and permutation.
// `spec` is out channels, kh, kw, stride (2), padding (top, bottom, left, right), dilation (2),
// activation. No schema has a trailing default: with one, autograd sees fewer inputs than backward
// returns.
STABLE_TORCH_LIBRARY(dass, m) {
  m.def("conv2d(Tensor x, Tensor values, Tensor pattern, Tensor? bias, Tensor? residual, int[] spec) -> Tensor");
  m.def("conv2d_lanes(Tensor x, Tensor values, Tensor pattern, Tensor? bias, int[] spec) -> Tensor");
  m.def("conv2d_dx(Tensor grad, Tensor values, Tensor pattern, int[] spec, SymInt c, SymInt h, SymInt w) -> Tensor");
  m.def("conv2d_dw(Tensor grad, Tensor x, Tensor pattern, int[] spec, SymInt count) -> Tensor");
  m.def("linear(Tensor x, Tensor values, Tensor pattern, Tensor? bias, int outputs, int activation) -> Tensor");
  m.def("linear_dx(Tensor grad, Tensor values, Tensor pattern, int inputs) -> Tensor");
  m.def("linear_dw(Tensor grad, Tensor x, Tensor pattern, SymInt count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dass, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&dass::conv2d));
  m.impl("conv2d_lanes", TORCH_BOX(&dass::conv2d_lanes));
  m.impl("conv2d_dx", TORCH_BOX(&dass::conv2d_dx));
  m.impl("conv2d_dw", TORCH_BOX(&dass::conv2d_dw));
  m.impl("linear", TORCH_BOX(&dass::linear));
  m.impl("linear_dx", TORCH_BOX(&dass::linear_dx));
  m.impl("linear_dw", TORCH_BOX(&dass::linear_dw));
}

namespace {

// One row per kernel of an instruction set: (name, op, format, dtype, pixels per tile).
template <class T>
void add_kernels(pybind11::list& rows, const dass::Kernels<T>& k, const std::string& dtype, const std::string& isa) {
  const char* formats[] = {"csr", "4x1", "8x1", "16x1"};
  const int sizes[] = {1, 4, 8, 16};
  const auto add = [&](const std::string& op, const std::string& format, int r, int v) {
    const int pixels = v * k.lanes;
    rows.append(pybind11::make_tuple(
        op + "_" + format + "_" + dtype + "_" + std::to_string(r) + "x" + std::to_string(pixels) + "__" + isa, op,
        format, dtype, pixels));
  };
  const char* addresses[] = {"", "_table", "_direct"};
  for (int a = 0; a < dass::kAddresses; ++a) {
    const std::string how = addresses[a];
    for (int s = 0; s < dass::kBlockSizes; ++s)
      for (int v = 0; v < dass::kMaxVectors; ++v)
        if (k.spmm[a][s][v]) add("spmm" + how, formats[s], sizes[s], v + 1);
    for (int v = 0; v < dass::kMaxVectors; ++v)
      if (k.blocked[a][v]) add("spmm_blocked" + how, "csr", 1, v + 1);
    for (int v = 0; v < k.max_sddmm; ++v) add("sddmm" + how, "csr", 1, v + 1);
  }
  if (k.squares[0]) add("spmm_squares", "csr", 1, 16);
  if (k.squares[1]) add("spmm_blocked_squares", "csr", 1, 16);
  if (k.gemv) add("gemv", "bits", 1, 0);
}

// The same for the dense kernels of compiled networks: the format is the taps of a depthwise one.
void add_dense(pybind11::list& rows, const dass::DenseKernels& k, const std::string& isa) {
  const auto add = [&](const std::string& op, const std::string& format = "") {
    const std::string name = op + (format.empty() ? "" : "_" + format) + "_f32__" + isa;
    rows.append(pybind11::make_tuple(name, op, format, "f32", 0));
  };
  for (int i = 0; i < 3; ++i)
    if (k.depthwise[i]) add("depthwise", std::to_string(2 * i + 3));
  if (k.pool) add("pool");
  if (k.map) add("map");
  if (k.mean) add("mean");
  if (k.gemv) add("gemv", "dense");
}

pybind11::list kernel_table(const std::string& isa) {
  const dass::KernelTable& table = dass::table_named(isa);
  pybind11::list rows;
  add_kernels(rows, table.f32, "f32", isa);
  add_kernels(rows, table.f64, "f64", isa);
  add_dense(rows, *table.dense, isa);
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("available_isas", &dass::available_isas);
  m.def("active_isa", [] { return std::string(dass::active_table().isa); });
  m.def("set_isa", &dass::set_isa);
  m.def(
      "lanes",
      [](const std::string& isa, const std::string& dtype) {
        const dass::KernelTable& table = dass::table_named(isa);
        return dtype == "f64" ? table.f64.lanes : table.f32.lanes;
      },
      pybind11::arg("isa"), pybind11::arg("dtype") = "f32");
  m.def("kernel_table", &kernel_table);
  dass::bind_program(m);
  m.attr("__version__") = DASS_VERSION;
  m.attr("built_torch") = DASS_TORCH_VERSION;
}
