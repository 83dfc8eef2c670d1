// The geometry that the arguments of a conv op describe, and its checks, for every device.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "shape.h"

namespace dass {

using torch::stable::Tensor;

inline Shape read_spec(const std::vector<int64_t>& spec, int64_t n, int64_t c, int64_t h, int64_t w, const char* op) {
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
  const int64_t span_h = s.h + s.pt + spec[kSpecPadBottom] - s.dh * (s.kh - 1);
  const int64_t span_w = s.w + s.pl + spec[kSpecPadRight] - s.dw * (s.kw - 1);
  STD_TORCH_CHECK(span_h > 0 && span_w > 0, op, ": the dilated kernel is larger than the padded input (", s.h, " x ",
                  s.w, ")");
  s.oh = (span_h - 1) / s.sh + 1;
  s.ow = (span_w - 1) / s.sw + 1;
  return s;
}

// The shape whose convolution with the transposed weight is the input gradient.
inline Shape transposed_shape(const Shape& s) {
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

inline void check_4d(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must have 4 dimensions (N, C, H, W), got ", t.dim());
}

inline void check_grad(const Tensor& g, const Shape& s, const char* op) {
  check_4d(g, op, "grad");
  STD_TORCH_CHECK(g.size(0) == s.n && g.size(1) == s.o && g.size(2) == s.oh && g.size(3) == s.ow, op,
                  ": grad must have the shape of the output, (", s.n, ", ", s.o, ", ", s.oh, ", ", s.ow, ")");
}

}  // namespace dass
