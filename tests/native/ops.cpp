// The ops of csrc/ops on the stand-in for torch: convolutions of every strategy and linear layers, with
// their gradients, against plain loops in double.
#include "ops/ops.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "packed.h"

namespace checks {
namespace {

using dass::Activation;

struct Conv {
  int64_t n, c, h, w, o, kh, kw, stride, pad_h, pad_w, dilation, groups, block;
  int64_t taps() const { return kh * kw; }
  int64_t columns() const { return c / groups * taps(); }
  int64_t oh() const { return (h + 2 * pad_h - dilation * (kh - 1) - 1) / stride + 1; }
  int64_t ow() const { return (w + 2 * pad_w - dilation * (kw - 1) - 1) / stride + 1; }
  bool valid() const { return h + 2 * pad_h > dilation * (kh - 1) && w + 2 * pad_w > dilation * (kw - 1); }
  std::vector<int64_t> spec(Activation a) const {
    return {o, kh, kw, stride, stride, pad_h, pad_h, pad_w, pad_w, dilation, dilation, a};
  }
  // Calls fn(output, column, element of the input) for each product of output pixel (n, o, oy, ox).
  template <class Fn>
  void products(int64_t image, int64_t out, int64_t oy, int64_t ox, const Fn& fn) const {
    const int64_t cg = c / groups, first = out / (o / groups) * cg;
    for (int64_t i = 0; i < cg; ++i)
      for (int64_t ky = 0; ky < kh; ++ky)
        for (int64_t kx = 0; kx < kw; ++kx) {
          const int64_t y = oy * stride + ky * dilation - pad_h, x = ox * stride + kx * dilation - pad_w;
          if (y < 0 || y >= h || x < 0 || x >= w) continue;
          fn((i * kh + ky) * kw + kx, ((image * c + first + i) * h + y) * w + x);
        }
  }
};

template <class T>
void check_conv(const Conv& s, int64_t percent, bool bias, bool residual, Activation activation, Random& random) {
  const Packed<T> p = random_packed<T>({s.o, s.columns(), s.taps(), s.groups, s.block}, percent, random);
  const Tensor x = random_tensor<T>({s.n, s.c, s.h, s.w}, random);
  const std::vector<int64_t> out{s.n, s.o, s.oh(), s.ow()};
  const Tensor dy = random_tensor<T>(out, random);
  std::optional<Tensor> b, r;
  if (bias) b = random_tensor<T>({s.o}, random);
  if (residual) r = random_tensor<T>(out, random);
  const Tensor y = dass::conv2d(x, p.values, p.pattern, b, r, s.spec(activation));
  const Tensor dx = dass::conv2d_dx(dy, p.values, p.pattern, s.spec(dass::kNone), s.c, s.h, s.w);
  const Tensor dw = dass::conv2d_dw(dy, x, p.pattern, s.spec(dass::kNone), p.values.numel());
  y.check("the output");
  dx.check("the input gradient");
  dw.check("the weight gradient");

  std::vector<Sum> dx_sums(x.numel()), dw_sums(p.values.numel());
  int64_t pixel = 0;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t o = 0; o < s.o; ++o)
      for (int64_t oy = 0; oy < s.oh(); ++oy)
        for (int64_t ox = 0; ox < s.ow(); ++ox, ++pixel) {
          Sum sum;
          if (b) sum.add(at<T>(*b)[o]);
          if (r) sum.add(at<T>(*r)[pixel]);
          const double grad = at<T>(dy)[pixel];
          s.products(n, o, oy, ox, [&](int64_t column, int64_t in) {
            const int64_t place = p.places[o * s.columns() + column];
            if (place < 0) return;
            sum.add(at<T>(p.values)[place], at<T>(x)[in]);
            dx_sums[in].add(at<T>(p.values)[place], grad);
            dw_sums[place].add(at<T>(x)[in], grad);
          });
          expect(at<T>(y)[pixel], activated(sum.value, activation), forward_bound<T>(sum, activation), "output", pixel);
        }
  for (int64_t i = 0; i < dx.numel(); ++i)
    expect(at<T>(dx)[i], dx_sums[i].value, dx_sums[i].template bound<T>(), "input gradient", i);
  for (int64_t i = 0; i < dw.numel(); ++i)
    expect(at<T>(dw)[i], dw_sums[i].value, dw_sums[i].template bound<T>(), "weight gradient", i);
}

// The same on images that lie innermost, by the lanes of a register: each is a convolution of its own.
template <class T>
void check_conv_lanes(const Conv& s, int64_t percent, Activation activation, Random& random) {
  const int64_t lanes = dass::kernels_of<T>(dass::active_table()).lanes;
  const Packed<T> p = random_packed<T>({s.o, s.columns(), s.taps(), s.groups, s.block}, percent, random);
  const Tensor x = random_tensor<T>({s.n, s.c, s.h, s.w, lanes}, random), b = random_tensor<T>({s.o}, random);
  const Tensor y = dass::conv2d_lanes(x, p.values, p.pattern, b, s.spec(activation));
  y.check("the output");
  int64_t pixel = 0;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t o = 0; o < s.o; ++o)
      for (int64_t oy = 0; oy < s.oh(); ++oy)
        for (int64_t ox = 0; ox < s.ow(); ++ox)
          for (int64_t lane = 0; lane < lanes; ++lane, ++pixel) {
            Sum sum;
            sum.add(at<T>(b)[o]);
            s.products(n, o, oy, ox, [&](int64_t column, int64_t in) {
              const int64_t place = p.places[o * s.columns() + column];
              if (place >= 0) sum.add(at<T>(p.values)[place], at<T>(x)[in * lanes + lane]);
            });
            expect(at<T>(y)[pixel], activated(sum.value, activation), forward_bound<T>(sum, activation), "output",
                   pixel);
          }
}

template <class T>
void check_linear(int64_t batch, int64_t inputs, int64_t outputs, int64_t block, int64_t percent, bool bias,
                  Activation activation, Random& random) {
  const Packed<T> p = random_packed<T>({outputs, inputs, 1, 1, block}, percent, random);
  const Tensor x = random_tensor<T>({batch, inputs}, random), dy = random_tensor<T>({batch, outputs}, random);
  std::optional<Tensor> b;
  if (bias) b = random_tensor<T>({outputs}, random);
  const Tensor y = dass::linear(x, p.values, p.pattern, b, outputs, activation);
  const Tensor dx = dass::linear_dx(dy, p.values, p.pattern, inputs);
  const Tensor dw = dass::linear_dw(dy, x, p.pattern, p.values.numel());
  y.check("the output");
  dx.check("the input gradient");
  dw.check("the weight gradient");
  std::vector<Sum> dx_sums(x.numel()), dw_sums(p.values.numel());
  for (int64_t n = 0; n < batch; ++n)
    for (int64_t o = 0; o < outputs; ++o) {
      Sum sum;
      if (b) sum.add(at<T>(*b)[o]);
      const double grad = at<T>(dy)[n * outputs + o];
      for (int64_t i = 0; i < inputs; ++i) {
        const int64_t place = p.places[o * inputs + i];
        if (place < 0) continue;
        sum.add(at<T>(p.values)[place], at<T>(x)[n * inputs + i]);
        dx_sums[n * inputs + i].add(at<T>(p.values)[place], grad);
        dw_sums[place].add(at<T>(x)[n * inputs + i], grad);
      }
      expect(at<T>(y)[n * outputs + o], activated(sum.value, activation), forward_bound<T>(sum, activation), "output",
             n * outputs + o);
    }
  for (int64_t i = 0; i < dx.numel(); ++i)
    expect(at<T>(dx)[i], dx_sums[i].value, dx_sums[i].template bound<T>(), "input gradient", i);
  for (int64_t i = 0; i < dw.numel(); ++i)
    expect(at<T>(dw)[i], dw_sums[i].value, dw_sums[i].template bound<T>(), "weight gradient", i);
}

int64_t one_of(std::initializer_list<int64_t> values, Random& random) {
  return values.begin()[random.below(static_cast<int64_t>(values.size()))];
}

// Batches around the lanes of a register, planes around its multiples.
Conv random_conv(int64_t lanes, Random& random) {
  Conv s{};
  do {
    s.n = one_of({1, 2, 3, lanes, lanes + 1, 2 * lanes}, random);
    s.groups = one_of({1, 1, 1, 2, 3}, random);
    s.c = s.groups * (1 + random.below(7));
    s.kh = one_of({1, 1, 2, 3}, random);
    s.kw = one_of({s.kh, s.kh, s.kh, 3}, random);
    s.h = 1 + random.below(11);
    s.w = one_of({1 + random.below(20), 2 * lanes + 1, 4 * lanes}, random);
    s.stride = one_of({1, 1, 1, 2, 3}, random);
    s.dilation = one_of({1, 1, 1, 2}, random);
    s.pad_h = random.below(s.kh);
    s.pad_w = random.below(s.kw);
    s.block = one_of({1, 1, 1, 4, 8, 16}, random);
    s.o = s.groups * (s.groups == 1 || s.block == 1 ? 1 + random.below(20) : s.block * (1 + random.below(2)));
  } while (!s.valid());
  return s;
}

std::string conv_name(const std::string& name, const Conv& s) {
  std::string text = name + " conv2d n c h w o kh kw stride padding dilation groups block threads";
  for (const int64_t v : {s.n, s.c, s.h, s.w, s.o, s.kh, s.kw, s.stride, s.pad_h, s.pad_w, s.dilation, s.groups,
                          s.block, int64_t{torch::stable::threads()}})
    text += " " + std::to_string(v);
  return text;
}

}  // namespace

template <class T>
int64_t check_convolutions(const std::string& name) {
  const int64_t lanes = dass::kernels_of<T>(dass::active_table()).lanes;
  Random random(1);
  int64_t done = 0;
  const auto check = [&](const Conv& s, int64_t percent) {
    torch::stable::threads() = 1 + static_cast<int>(done % 3);
    current() = conv_name(name, s);
    check_conv<T>(s, percent, random.below(2) != 0, random.below(3) == 0, static_cast<Activation>(done++ % 4), random);
  };
  for (int i = 0; i < 300; ++i) check(random_conv(lanes, random), one_of({5, 30, 100}, random));
  // Channels that do not all fit in L1, with enough nonzeros to be done in blocks of them.
  for (const int64_t k : {1, 3})
    for (const int64_t n : {int64_t{1}, lanes})
      check({n, k == 1 ? 700 : 300, 5, 4 * lanes + 1, 3, k, k, 1, k / 2, k / 2, 1, 1, 1}, 40);
  for (int i = 0; i < 60; ++i, ++done) {
    Conv s = random_conv(lanes, random);
    s.stride = 1;
    s.h += 2 * s.pad_h;
    s.w += 2 * s.pad_w;
    s.pad_h = s.pad_w = 0;
    s.n = 1 + i % 2;
    if (!s.valid()) continue;
    current() = conv_name(name + " lanes,", s);
    check_conv_lanes<T>(s, one_of({10, 50}, random), static_cast<Activation>(i % 4), random);
  }
  return done;
}

template <class T>
int64_t check_linears(const std::string& name) {
  Random random(1);
  int64_t done = 0;
  for (const int64_t batch : {1, 2, 5, 16, 33, 150})
    for (const int64_t block : kBlocks)
      for (const int64_t percent : {10, 60})
        for (const int64_t inputs : {1, 16, 45}) {
          torch::stable::threads() = 1 + static_cast<int>(done % 3);
          const int64_t outputs = 1 + random.below(40);
          current() = name + " linear, batch " + std::to_string(batch) + ", " + std::to_string(outputs) + " x " +
                      std::to_string(inputs) + ", block " + std::to_string(block);
          check_linear<T>(batch, inputs, outputs, block, percent, done % 2 == 0, static_cast<Activation>(done % 4),
                          random);
          ++done;
        }
  return done;
}

template int64_t check_convolutions<float>(const std::string&);
template int64_t check_convolutions<double>(const std::string&);
template int64_t check_linears<float>(const std::string&);
template int64_t check_linears<double>(const std::string&);

}  // namespace checks
