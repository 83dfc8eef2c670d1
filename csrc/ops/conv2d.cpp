// conv2d, its input gradient and its weight gradient on the mask.
#include "checks.h"
#include "conv_forward.h"
#include "conv_sddmm.h"
#include "ops.h"
#include "spec.h"

namespace dass {
namespace {

// The geometry of a spec that fits the pattern.
Shape shape_of(const std::vector<int64_t>& spec, int64_t n, int64_t c, int64_t h, int64_t w, const Pattern& p,
               const char* op) {
  const Shape s = read_spec(spec, n, c, h, w, op);
  STD_TORCH_CHECK(s.o == p.outputs && s.kh * s.kw == p.taps, op, ": the pattern is of ", p.outputs, " outputs and ",
                  p.taps, " taps, the spec of ", s.o, " outputs and ", s.kh, " x ", s.kw, " taps");
  STD_TORCH_CHECK(c == p.channels(), op, ": input has ", c, " channels, expected ", p.channels());
  return s;
}

}  // namespace

Tensor conv2d(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, std::vector<int64_t> spec) {
  const char* op = "dass::conv2d";
  const Pattern p = read_pattern(pattern, op);
  const ScalarType dtype = x.scalar_type();
  check_4d(x, op, "input");
  check_values(values, p, dtype, op);
  check_bias(bias, p, dtype, op);
  const Shape s = shape_of(spec, x.size(0), x.size(1), x.size(2), x.size(3), p, op);
  const Activation act = check_activation(spec[kSpecActivation], op);
  const Tensor xc = dense(x), vc = dense(values);
  std::optional<Tensor> bc, rc;
  if (bias) bc = dense(*bias);
  if (residual) {
    check_float(*residual, dtype, op, "residual");
    check_grad(*residual, s, "dass::conv2d residual");
    rc = dense(*residual);
  }
  Tensor y = new_output(x, {s.n, s.o, s.oh, s.ow});
  by_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Epilogue<T> e{bc ? data<T>(*bc) : nullptr, rc ? data<T>(*rc) : nullptr, act};
    run_conv<T>(kernels_of<T>(active_table()), weight_matrix(p, data<T>(vc)), s, data<T>(xc), mutable_data<T>(y), e);
  });
  return y;
}

Tensor conv2d_lanes(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
                    std::vector<int64_t> spec) {
  const char* op = "dass::conv2d_lanes";
  const Pattern p = read_pattern(pattern, op);
  const ScalarType dtype = x.scalar_type();
  check_values(values, p, dtype, op);
  check_bias(bias, p, dtype, op);
  STD_TORCH_CHECK(x.dim() == 5 && x.stride(4) == 1 && x.stride(3) == x.size(4) && x.stride(2) == x.size(3) * x.size(4),
                  op, ": input must be (N, C, H, W, lanes) with contiguous planes");
  STD_TORCH_CHECK(x.stride(1) % x.size(4) == 0, op, ": input must be whole registers from channel to channel");
  const Shape s = shape_of(spec, x.size(0), x.size(1), x.size(2), x.size(3), p, op);
  STD_TORCH_CHECK(s.sh == 1 && s.sw == 1, op, ": stride must be 1");
  STD_TORCH_CHECK(s.pt == 0 && s.pl == 0 && spec[kSpecPadBottom] == 0 && spec[kSpecPadRight] == 0, op,
                  ": padding part of the input, so 0 here");
  STD_TORCH_CHECK(s.c / p.groups * x.stride(1) <= INT32_MAX, op, ": one image group is too large");
  const Activation act = check_activation(spec[kSpecActivation], op);
  const Tensor vc = dense(values);
  std::optional<Tensor> bc;
  if (bias) bc = dense(*bias);
  Tensor y = new_output(x, {s.n, s.o, s.oh, s.ow, x.size(4)});
  if (s.n == 0 || s.o == 0) return y;
  by_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Kernels<T>& k = kernels_of<T>(active_table());
    STD_TORCH_CHECK(x.size(4) == k.lanes, op, ": the last dimension must be ", k.lanes, " lanes (", active_table().isa,
                    "), got ", x.size(4));
    const Epilogue<T> e{bc ? data<T>(*bc) : nullptr, nullptr, act};
    conv_in_lanes<T>(k, weight_matrix(p, data<T>(vc)), s, data<T>(x), x.stride(0), x.stride(1), mutable_data<T>(y), e);
  });
  return y;
}

Tensor conv2d_dx(const Tensor& grad, const Tensor& values, const Tensor& pattern, std::vector<int64_t> spec, int64_t c,
                 int64_t h, int64_t w) {
  const char* op = "dass::conv2d_dx";
  const Pattern p = read_pattern(pattern, op);
  const ScalarType dtype = grad.scalar_type();
  check_4d(grad, op, "grad");
  check_values(values, p, dtype, op);
  const Shape s = shape_of(spec, grad.size(0), c, h, w, p, op);
  check_grad(grad, s, op);
  const Tensor gc = dense(grad), vc = dense(values);
  Tensor dx = new_output(grad, {s.n, s.c, s.h, s.w});
  by_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Matrix<T> m = transposed_matrix(p, data<T>(vc), buffer(kValues).get<T>(p.elements));
    run_conv<T>(kernels_of<T>(active_table()), m, transposed_shape(s), data<T>(gc), mutable_data<T>(dx),
                Epilogue<T>{nullptr, nullptr, kNone});
  });
  return dx;
}

Tensor conv2d_dw(const Tensor& grad, const Tensor& x, const Tensor& pattern, std::vector<int64_t> spec, int64_t count) {
  const char* op = "dass::conv2d_dw";
  const Pattern p = read_pattern(pattern, op);
  const ScalarType dtype = x.scalar_type();
  check_4d(x, op, "input");
  check_float(grad, dtype, op, "grad");
  STD_TORCH_CHECK(count == p.value_count(), op, ": count must be ", p.value_count(), ", got ", count);
  const Shape s = shape_of(spec, x.size(0), x.size(1), x.size(2), x.size(3), p, op);
  check_grad(grad, s, op);
  const Tensor gc = dense(grad), xc = dense(x);
  Tensor dv = torch::stable::new_zeros(x, {count});
  by_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    run_sddmm<T>(kernels_of<T>(active_table()), weight_matrix<T>(p, nullptr), s, data<T>(xc), data<T>(gc),
                 mutable_data<T>(dv));
  });
  return dv;
}

}  // namespace dass
