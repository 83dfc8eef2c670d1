// conv2d, its input gradient and its weight gradient on the mask.
#include "checks.h"
#include "conv_forward.h"
#include "conv_sddmm.h"
#include "ops.h"

namespace dass {
namespace {

Shape read_spec(const std::vector<int64_t>& spec, int64_t n, int64_t c, int64_t h, int64_t w, const Pattern& p,
                const char* op) {
  STD_TORCH_CHECK(spec.size() == kSpecWords, op, ": spec must have ", static_cast<int>(kSpecWords), " integers, got ",
                  spec.size());
  const char* names[] = {"outputs", "kernel",  "kernel",  "stride",   "stride",   "padding",
                         "padding", "padding", "padding", "dilation", "dilation", "activation"};
  for (int i = 0; i < kSpecWords; ++i)
    STD_TORCH_CHECK(spec[i] >= 0 && spec[i] <= INT32_MAX, op, ": ", names[i], " must be in [0, 2^31), got ", spec[i]);
  Shape s{};
  s.n = n;
  s.c = c;
  s.h = h;
  s.w = w;
  s.o = spec[kSpecOutputs];
  s.kh = spec[kSpecKh];
  s.kw = spec[kSpecKw];
  s.sh = spec[kSpecStrideH];
  s.sw = spec[kSpecStrideW];
  s.pt = spec[kSpecPadTop];
  s.pl = spec[kSpecPadLeft];
  s.dh = spec[kSpecDilationH];
  s.dw = spec[kSpecDilationW];
  STD_TORCH_CHECK(s.sh > 0 && s.sw > 0 && s.dh > 0 && s.dw > 0, op, ": stride and dilation must be positive");
  STD_TORCH_CHECK(s.o == p.outputs && s.kh * s.kw == p.taps, op, ": the pattern is of ", p.outputs, " outputs and ",
                  p.taps, " taps, the spec of ", s.o, " outputs and ", s.kh, " x ", s.kw, " taps");
  STD_TORCH_CHECK(c == p.channels(), op, ": input has ", c, " channels, expected ", p.channels());
  const int64_t span_h = s.h + s.pt + spec[kSpecPadBottom] - s.dh * (s.kh - 1);
  const int64_t span_w = s.w + s.pl + spec[kSpecPadRight] - s.dw * (s.kw - 1);
  STD_TORCH_CHECK(span_h > 0 && span_w > 0, op, ": the dilated kernel is larger than the padded input (", s.h, " x ",
                  s.w, ")");
  s.oh = (span_h - 1) / s.sh + 1;
  s.ow = (span_w - 1) / s.sw + 1;
  return s;
}

// The shape whose convolution with the transposed weight is the input gradient.
Shape transposed_shape(const Shape& s) {
  Shape t = s;
  t.c = s.o;
  t.h = s.oh;
  t.w = s.ow;
  t.o = s.c;
  t.oh = s.h;
  t.ow = s.w;
  t.sh = t.sw = 1;
  t.uh = s.sh;
  t.uw = s.sw;
  t.pt = s.dh * (s.kh - 1) - s.pt;
  t.pl = s.dw * (s.kw - 1) - s.pl;
  return t;
}

void check_4d(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must have 4 dimensions (N, C, H, W), got ", t.dim());
}

void check_grad(const Tensor& g, const Shape& s, const char* op) {
  check_4d(g, op, "grad");
  STD_TORCH_CHECK(g.size(0) == s.n && g.size(1) == s.o && g.size(2) == s.oh && g.size(3) == s.ow, op,
                  ": grad must have the shape of the output, (", s.n, ", ", s.o, ", ", s.oh, ", ", s.ow, ")");
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
  const Shape s = read_spec(spec, x.size(0), x.size(1), x.size(2), x.size(3), p, op);
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
  const Shape s = read_spec(spec, x.size(0), x.size(1), x.size(2), x.size(3), p, op);
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
  const Shape s = read_spec(spec, grad.size(0), c, h, w, p, op);
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
  const Shape s = read_spec(spec, x.size(0), x.size(1), x.size(2), x.size(3), p, op);
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
