// Checks, outputs and launches of the CUDA ops. What only the device knows, the header of the
// pattern, is checked there (pattern.cuh).
#include "ops.h"

#include "../ops/spec.h"
#include "checks.h"
#include "device.h"
#include "kernels.h"

namespace dass::cuda {
namespace {

int narrowed(int64_t v, const char* op) {
  STD_TORCH_CHECK(v >= INT32_MIN && v <= INT32_MAX, op, ": a size of ", v, " does not fit in 32 bits");
  return static_cast<int>(v);
}

Window window_of(const Shape& s, const char* op) {
  STD_TORCH_CHECK(s.kh > 0 && s.kw > 0, op, ": the kernel must be at least 1 x 1");
  const int64_t rows = (s.oh - 1) * s.sh + s.dh * (s.kh - 1) + 1, columns = (s.ow - 1) * s.sw + s.dw * (s.kw - 1) + 1;
  // Sums that the kernels form in 32 bits.
  const int64_t sums[] = {rows,        columns,  s.h + s.pt, s.w + s.pl, (s.h - 1) * s.uh, (s.w - 1) * s.uw,
                          s.oh * s.ow, s.h * s.w};
  for (const int64_t v : sums) narrowed(v, op);
  const auto i = [op](int64_t v) { return narrowed(v, op); };
  Window w{};
  w.n = i(s.n), w.c = i(s.c), w.h = i(s.h), w.w = i(s.w);
  w.o = i(s.o), w.oh = i(s.oh), w.ow = i(s.ow);
  w.kh = i(s.kh), w.kw = i(s.kw), w.sh = i(s.sh), w.sw = i(s.sw);
  w.pt = i(s.pt), w.pl = i(s.pl), w.dh = i(s.dh), w.dw = i(s.dw);
  w.uh = i(s.uh), w.uw = i(s.uw);
  // Rows and slabs are the y of a grid.
  constexpr int64_t kMost = int64_t{65535} * 64;
  STD_TORCH_CHECK(s.o <= kMost && s.c * s.kh * s.kw <= kMost, op, ": at most ", kMost,
                  " outputs and input channels times taps");
  STD_TORCH_CHECK(s.n * s.oh * s.ow / 128 < INT32_MAX, op, ": too many output pixels");
  return w;
}

Window matrix_window(int64_t batch, int64_t inputs, int64_t outputs, const char* op) {
  Shape s{};
  s.n = batch, s.c = inputs, s.o = outputs;
  s.h = s.w = s.oh = s.ow = s.kh = s.kw = s.sh = s.sw = s.dh = s.dw = 1;
  return window_of(s, op);
}

PatternTensor pattern_of(const Tensor& pattern, const Tensor& values) {
  return {static_cast<const int32_t*>(pattern.const_data_ptr()), pattern.size(0), values.size(0)};
}

bool empty(const Window& w) { return w.n == 0 || w.o == 0 || w.oh == 0 || w.ow == 0; }

void check_launch(const char* error, const char* op) { STD_TORCH_CHECK(!error, op, ": CUDA: ", error ? error : ""); }

// The weight, or with `transposed` its transpose, times x.
Tensor run_spmm(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, Activation activation, bool transposed, const Window& w,
                std::initializer_list<int64_t> size, const char* op) {
  const OnDevice device(x);
  const Tensor xc = dense(x), vc = dense(values);
  std::optional<Tensor> bc, rc;
  if (bias) bc = dense(*bias);
  if (residual) rc = dense(*residual);
  Tensor y = torch::stable::new_empty(x, size);
  if (empty(w)) return y;
  SpmmArguments a{};
  a.dtype = dtype_of(x, op);
  a.pattern = pattern_of(pattern, vc);
  a.transposed = transposed;
  a.window = w;
  a.x = xc.const_data_ptr();
  a.values = vc.const_data_ptr();
  a.bias = bc ? bc->const_data_ptr() : nullptr;
  a.residual = rc ? rc->const_data_ptr() : nullptr;
  a.activation = activation;
  a.y = y.mutable_data_ptr();
  check_launch(spmm_csr(a, device.stream()), op);
  return y;
}

Tensor run_sddmm(const Tensor& grad, const Tensor& x, const Tensor& pattern, const Window& w, int64_t count,
                 const char* op) {
  const OnDevice device(x);
  const Tensor gc = dense(grad), xc = dense(x);
  Tensor dvalues = torch::stable::new_zeros(x, {count});
  if (empty(w) || count == 0) return dvalues;
  SddmmArguments a{};
  a.dtype = dtype_of(x, op);
  a.pattern = {static_cast<const int32_t*>(pattern.const_data_ptr()), pattern.size(0), count};
  a.window = w;
  a.x = xc.const_data_ptr();
  a.dy = gc.const_data_ptr();
  a.splits = sddmm_splits(w);
  const bool direct = a.dtype == Dtype::kFloat && a.splits == 1;
  Tensor partial = direct ? dvalues : torch::stable::new_zeros(x, {a.splits, count}, ScalarType::Float);
  a.partial = static_cast<float*>(partial.mutable_data_ptr());
  a.dvalues = direct ? nullptr : dvalues.mutable_data_ptr();
  check_launch(sddmm_csr(a, device.stream()), op);
  return dvalues;
}

}  // namespace

Tensor conv2d(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, std::vector<int64_t> spec) {
  const char* op = "dass::conv2d";
  check_4d(x, op, "input");
  check_weight(values, pattern, x, op);
  const Shape s = read_spec(spec, x.size(0), x.size(1), x.size(2), x.size(3), op);
  const Activation act = check_activation(spec[kSpecActivation], op);
  check_bias(bias, s.o, x, op);
  if (residual) {
    check_like(*residual, x, op, "residual");
    check_grad(*residual, s, "dass::conv2d residual");
  }
  return run_spmm(x, values, pattern, bias, residual, act, false, window_of(s, op), {s.n, s.o, s.oh, s.ow}, op);
}

Tensor conv2d_dx(const Tensor& grad, const Tensor& values, const Tensor& pattern, std::vector<int64_t> spec, int64_t c,
                 int64_t h, int64_t w) {
  const char* op = "dass::conv2d_dx";
  check_4d(grad, op, "grad");
  check_weight(values, pattern, grad, op);
  const Shape s = read_spec(spec, grad.size(0), c, h, w, op);
  check_grad(grad, s, op);
  const Window t = window_of(transposed_shape(s), op);
  return run_spmm(grad, values, pattern, std::nullopt, std::nullopt, kNone, true, t, {s.n, s.c, s.h, s.w}, op);
}

Tensor conv2d_dw(const Tensor& grad, const Tensor& x, const Tensor& pattern, std::vector<int64_t> spec, int64_t count) {
  const char* op = "dass::conv2d_dw";
  check_4d(x, op, "input");
  check_like(grad, x, op, "grad");
  check_pattern(pattern, x, op);
  STD_TORCH_CHECK(count >= 0, op, ": count must not be negative, got ", count);
  const Shape s = read_spec(spec, x.size(0), x.size(1), x.size(2), x.size(3), op);
  check_grad(grad, s, op);
  return run_sddmm(grad, x, pattern, window_of(s, op), count, op);
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
              int64_t outputs, int64_t activation) {
  const char* op = "dass::linear";
  check_2d(x, op, "input");
  check_weight(values, pattern, x, op);
  check_bias(bias, outputs, x, op);
  const Activation act = check_activation(activation, op);
  const Window w = matrix_window(x.size(0), x.size(1), outputs, op);
  return run_spmm(x, values, pattern, bias, std::nullopt, act, false, w, {x.size(0), outputs}, op);
}

Tensor linear_dx(const Tensor& grad, const Tensor& values, const Tensor& pattern, int64_t inputs) {
  const char* op = "dass::linear_dx";
  check_2d(grad, op, "grad");
  check_weight(values, pattern, grad, op);
  const Window w = matrix_window(grad.size(0), grad.size(1), inputs, op);
  return run_spmm(grad, values, pattern, std::nullopt, std::nullopt, kNone, true, w, {grad.size(0), inputs}, op);
}

Tensor linear_dw(const Tensor& grad, const Tensor& x, const Tensor& pattern, int64_t count) {
  const char* op = "dass::linear_dw";
  check_2d(x, op, "input");
  check_2d(grad, op, "grad");
  check_like(grad, x, op, "grad");
  check_pattern(pattern, x, op);
  STD_TORCH_CHECK(count >= 0, op, ": count must not be negative, got ", count);
  STD_TORCH_CHECK(grad.size(0) == x.size(0), op, ": grad has ", grad.size(0), " rows, input ", x.size(0));
  return run_sddmm(grad, x, pattern, matrix_window(x.size(0), x.size(1), grad.size(1), op), count, op);
}

Tensor build_pattern(const Tensor& mask, int64_t groups) {
  const char* op = "dass::build_pattern";
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && (mask.dim() == 2 || mask.dim() == 4), op,
                  ": mask must be bool, [O, I] or [O, I / groups, kh, kw]");
  const int64_t outputs = mask.size(0), taps = mask.dim() == 4 ? mask.size(2) * mask.size(3) : 1;
  STD_TORCH_CHECK(taps > 0, op, ": mask must have a kernel of at least 1 x 1");
  STD_TORCH_CHECK(groups > 0 && outputs % groups == 0, op, ": groups must divide the ", outputs, " outputs, got ",
                  groups);
  const int64_t columns = mask.size(1) * taps;
  STD_TORCH_CHECK(outputs * columns <= INT32_MAX && mask.size(1) * groups < INT32_MAX, op,
                  ": mask is too large for 32-bit indices");
  const OnDevice device(mask);
  const Tensor mc = dense(mask);
  Tensor starts = torch::stable::new_empty(mask, {outputs + mask.size(1) * groups + 2}, ScalarType::Int);
  PackArguments a{};
  a.mask = static_cast<const uint8_t*>(mc.const_data_ptr());
  a.outputs = narrowed(outputs, op);
  a.columns = narrowed(columns, op);
  a.taps = narrowed(taps, op);
  a.groups = narrowed(groups, op);
  a.starts = static_cast<int32_t*>(starts.mutable_data_ptr());
  int32_t kept = 0;
  check_launch(count_kept(a, &kept, device.stream()), op);
  const int64_t length = pattern_length(a, kept);
  STD_TORCH_CHECK(length <= INT32_MAX, op, ": pattern needs ", length, " words; offsets are int32");
  Tensor pattern = torch::stable::new_empty(mask, {length}, ScalarType::Int);
  check_launch(fill_pattern(a, kept, static_cast<int32_t*>(pattern.mutable_data_ptr()), device.stream()), op);
  return pattern;
}

}  // namespace dass::cuda
