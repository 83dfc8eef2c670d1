// linear, its input gradient and its weight gradient on the mask.
#include "checks.h"
#include "conv_forward.h"
#include "conv_sddmm.h"
#include "ops.h"

namespace dass {
namespace {

// y[b, r] = act(bias[r] + sum_k w[r, k] x[b, k]): batch rows become the pixels of a panel.
template <class T>
void run_linear(const Kernels<T>& k, const Matrix<T>& m, int64_t batch, const T* x, T* y, const Epilogue<T>& e) {
  if (batch == 0 || m.outputs == 0) return;
  const int64_t lanes = k.lanes, inputs = m.columns;
  const int64_t vectors = tile_vectors(ceil_div(batch, lanes), most_vectors(k, m, kPitch));
  const int64_t width = vectors * lanes;
  for_units(ceil_div(batch, width), [&](int64_t unit, int64_t first, int64_t last, int64_t parts) {
    const int64_t b0 = unit * width, count = std::min(width, batch - b0), v = ceil_div(count, lanes);
    SpmmTile<T> t = make_tile(m, e);
    set_rows(t, m, 0, first, last, parts);
    t.pitch = v * lanes;
    t.ldy = v * lanes;
    t.tail = static_cast<int32_t>(lanes);
    T* panel = buffer(kPanel).get<T>(inputs * t.pitch);
    if (count < t.pitch) std::memset(panel, 0, inputs * t.pitch * sizeof(T));
    k.transpose(x + b0 * inputs, inputs, panel, t.pitch, count, inputs);
    t.x = panel;
    const int64_t chunk = std::max<int64_t>(1, kRowChunk / m.block), end = t.row_end;
    T* out = buffer(kOutput).get<T>(chunk * m.block * t.ldy);
    for (int64_t r = t.row_begin; r < end; r += chunk) {
      t.row_begin = r;
      t.row_end = std::min(r + chunk, end);
      t.y = out - r * m.block * t.ldy;
      run_tile(k, m, t, pitch_entries(m), v, inputs);
      const int64_t outputs = std::min(t.row_end * m.block, m.outputs) - r * m.block;
      k.transpose(out, t.ldy, y + b0 * m.outputs + r * m.block, m.outputs, outputs, count);
    }
  });
}

// One row and not very sparse: the weights' bytes bound the time, so expand them from the bit mask.
// 1.5 ns for 16 weights against 0.45 ns a nonzero in run_linear: worth it from a density of 0.15 on,
// and above that only for matrices too large for the caches (4096 x 4096 at 0.2: 1.6 against 2.4 ms).
template <class T>
void run_gemv(const Kernels<T>& k, const Matrix<T>& m, const uint16_t* bits, const T* x, T* y, const Epilogue<T>& e) {
  GemvTile<T> t{};
  t.words = ceil_div(m.columns, 16);
  T* padded = buffer(kPanel).get<T>(t.words * 16);
  std::copy_n(x, m.columns, padded);
  std::fill(padded + m.columns, padded + t.words * 16, T(0));
  t.x = padded;
  t.values = m.values;
  t.indptr = m.indptr;
  t.bits = bits;
  t.y = y;
  t.bias = e.bias;
  t.activation = e.activation;
  for_units(1, [&](int64_t, int64_t first, int64_t last, int64_t parts) {
    GemvTile<T> part = t;
    part.row_begin = split_rows(m.indptr, 0, m.block_rows, first, parts);
    part.row_end = split_rows(m.indptr, 0, m.block_rows, last, parts);
    k.gemv(part);
  });
}

template <class T>
void run_linear_sddmm(const Kernels<T>& k, const Matrix<T>& m, int64_t batch, const T* x, const T* dy, T* dvalues) {
  const int64_t width = std::min<int64_t>(ceil_div(batch, k.lanes), k.max_sddmm) * k.lanes;
  SddmmTile<T> t = make_sddmm<T>(m, m.indices, nullptr, dvalues);
  t.pitch = t.lddy = width;
  T* panel = buffer(kPanel).get<T>(m.columns * width);
  T* grads = buffer(kOutput).get<T>(m.outputs * width);
  for (int64_t b0 = 0; b0 < batch; b0 += width) {
    const int64_t count = std::min(width, batch - b0);
    if (count < width) {
      std::memset(panel, 0, m.columns * width * sizeof(T));
      std::memset(grads, 0, m.outputs * width * sizeof(T));
    }
    k.transpose(x + b0 * m.columns, m.columns, panel, width, count, m.columns);
    k.transpose(dy + b0 * m.outputs, m.outputs, grads, width, count, m.outputs);
    t.x = panel;
    t.dy = grads;
    run_rows(m, 0, t, k.sddmm[kPitch], width / k.lanes, k.max_sddmm, k.lanes);
  }
}

void check_matrix(const Pattern& p, const char* op) {
  STD_TORCH_CHECK(p.taps == 1 && p.groups == 1, op, ": the pattern is of a convolution (", p.taps, " taps, ", p.groups,
                  " groups), expected one of a matrix");
}

void check_2d(const Tensor& t, int64_t columns, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == columns, op, ": ", name, " must be (batch, ", columns, ")");
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& pattern, const std::optional<Tensor>& bias,
              int64_t outputs, int64_t activation) {
  const char* op = "dass::linear";
  const Pattern p = read_pattern(pattern, op);
  const ScalarType dtype = x.scalar_type();
  check_matrix(p, op);
  check_2d(x, p.columns, op, "input");
  check_values(values, p, dtype, op);
  check_bias(bias, p, dtype, op);
  STD_TORCH_CHECK(outputs == p.outputs, op, ": outputs must be ", p.outputs, ", got ", outputs);
  const Activation act = check_activation(activation, op);
  const Tensor xc = dense(x), vc = dense(values);
  std::optional<Tensor> bc;
  if (bias) bc = dense(*bias);
  Tensor y = torch::stable::new_empty(x, {x.size(0), outputs});
  by_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Epilogue<T> e{bc ? data<T>(*bc) : nullptr, nullptr, act};
    const Kernels<T>& k = kernels_of<T>(active_table());
    if (k.gemv && p.bits && x.size(0) == 1) {
      run_gemv<T>(k, weight_matrix(p, data<T>(vc)), p.bits, data<T>(xc), mutable_data<T>(y), e);
      return;
    }
    run_linear<T>(kernels_of<T>(active_table()), weight_matrix(p, data<T>(vc)), x.size(0), data<T>(xc),
                  mutable_data<T>(y), e);
  });
  return y;
}

Tensor linear_dx(const Tensor& grad, const Tensor& values, const Tensor& pattern, int64_t inputs) {
  const char* op = "dass::linear_dx";
  const Pattern p = read_pattern(pattern, op);
  const ScalarType dtype = grad.scalar_type();
  check_matrix(p, op);
  check_2d(grad, p.outputs, op, "grad");
  check_values(values, p, dtype, op);
  STD_TORCH_CHECK(inputs == p.columns, op, ": inputs must be ", p.columns, ", got ", inputs);
  const Tensor gc = dense(grad), vc = dense(values);
  Tensor dx = torch::stable::new_empty(grad, {grad.size(0), inputs});
  by_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Matrix<T> m = transposed_matrix(p, data<T>(vc), buffer(kValues).get<T>(p.elements));
    run_linear<T>(kernels_of<T>(active_table()), m, grad.size(0), data<T>(gc), mutable_data<T>(dx),
                  Epilogue<T>{nullptr, nullptr, kNone});
  });
  return dx;
}

Tensor linear_dw(const Tensor& grad, const Tensor& x, const Tensor& pattern, int64_t count) {
  const char* op = "dass::linear_dw";
  const Pattern p = read_pattern(pattern, op);
  const ScalarType dtype = x.scalar_type();
  check_matrix(p, op);
  check_2d(x, p.columns, op, "input");
  check_2d(grad, p.outputs, op, "grad");
  check_float(grad, dtype, op, "grad");
  STD_TORCH_CHECK(grad.size(0) == x.size(0), op, ": grad has ", grad.size(0), " rows, input ", x.size(0));
  STD_TORCH_CHECK(count == p.value_count(), op, ": count must be ", p.value_count(), ", got ", count);
  const Tensor gc = dense(grad), xc = dense(x);
  Tensor dv = torch::stable::new_zeros(x, {count});
  by_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    run_linear_sddmm<T>(kernels_of<T>(active_table()), weight_matrix<T>(p, nullptr), x.size(0), data<T>(xc),
                        data<T>(gc), mutable_data<T>(dv));
  });
  return dv;
}

}  // namespace dass
