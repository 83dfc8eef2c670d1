// sddmm, gemv and transpose, against a plain loop in double.
#include "checks.h"

namespace checks {
namespace {

using dass::GemvTile;
using dass::SddmmTile;

constexpr int64_t kColumns = 20;

// A tile of `vectors` vectors; rows hold 0, 1, 2, ... entries, and the last block of rows is short.
template <class T>
void check_sddmm_case(dass::SddmmFn<T> kernel, int address, int block, int64_t width, bool all, Random& random) {
  const int64_t block_rows = block == 1 ? kColumns + 1 : 4;
  const int64_t outputs = block_rows * block - (block > 1 ? 1 + random.below(block - 1) : 0);
  const Rows rows = random_rows(block_rows, block == 1 ? kColumns : 3, random);
  const int64_t pitch = 1 + random.below(width), lddy = width + random.below(4);
  std::vector<int32_t> starts;
  for (int64_t c = 0, at = 0; c < kColumns; ++c) {
    starts.push_back(static_cast<int32_t>(at));
    at += address == dass::kPitch ? pitch : random.below(6);
  }
  Guarded<T> x(starts.back() + width), dy((outputs - 1) * lddy + width), dvalues(rows.columns.size() * block);
  Guarded<int32_t> indptr(block_rows + 1), indices(rows.columns.size()), offsets(kColumns);
  x.fill(random);
  for (int64_t r = 0; r < outputs; ++r)
    for (int64_t i = 0; i < width; ++i) dy[r * lddy + i] = random.number<T>();
  // Gradients are added to what is there; those past the last output stay poisoned.
  for (int64_t b = 0; b < block_rows; ++b)
    for (int32_t i = rows.indptr[b]; i < rows.indptr[b + 1]; ++i)
      for (int r = 0; r < block && b * block + r < outputs; ++r) dvalues[i * block + r] = random.number<T>();
  const std::vector<T> before(dvalues.data(), dvalues.data() + dvalues.size());
  copy_to(indptr, rows.indptr);
  copy_to(indices, rows.columns);
  copy_to(offsets, starts);
  if (address == dass::kDirect)
    for (int64_t i = 0; i < indices.size(); ++i) indices[i] = starts[indices[i]];

  SddmmTile<T> t{};
  t.x = x.data();
  t.offsets = offsets.data();
  t.pitch = pitch;
  t.dy = dy.data();
  t.lddy = lddy;
  t.indices = indices.data();
  t.indptr = indptr.data();
  t.row_begin = all ? 0 : 1;
  t.row_end = all ? block_rows : block_rows - 1;
  t.outputs = outputs;
  t.block = block;
  t.dvalues = dvalues.data();
  kernel(t);
  dvalues.check("the gradients");
  for (int64_t b = 0; b < block_rows; ++b)
    for (int32_t i = rows.indptr[b]; i < rows.indptr[b + 1]; ++i)
      for (int r = 0; r < block; ++r) {
        const int64_t at = i * block + r, row = b * block + r;
        if (row >= outputs) {
          expect_untouched(dvalues[at], "gradient", at);
          continue;
        }
        Sum sum;
        sum.add(before[at]);
        const bool done = b >= t.row_begin && b < t.row_end;
        for (int64_t j = 0; done && j < width; ++j) sum.add(dy[row * lddy + j], x[starts[rows.columns[i]] + j]);
        expect(dvalues[at], sum.value, done ? sum.bound<T>() : 0, "gradient", at);
      }
}

template <class T>
void check_gemv_case(dass::GemvFn<T> kernel, int64_t rows, int64_t columns, dass::Activation activation, bool bias,
                     Random& random) {
  const int64_t words = (columns + 15) / 16;
  Rows m = random_rows(rows, columns, random);
  Guarded<T> x(words * 16), values(m.columns.size()), y(rows), b(rows);
  Guarded<int32_t> indptr(rows + 1);
  std::vector<uint16_t> bits(rows * words);
  x.fill(random);
  values.fill(random);
  b.fill(random);
  copy_to(indptr, m.indptr);
  // A column without weights may hold anything.
  std::vector<bool> used(words * 16);
  for (int64_t r = 0; r < rows; ++r)
    for (int32_t i = m.indptr[r]; i < m.indptr[r + 1]; ++i) {
      bits[r * words + m.columns[i] / 16] |= static_cast<uint16_t>(1u << m.columns[i] % 16);
      used[m.columns[i]] = true;
    }
  for (int64_t c = 0; c < x.size(); ++c)
    if (!used[c]) x[c] = poison<T>();
  GemvTile<T> t{};
  t.x = x.data();
  t.values = values.data();
  t.indptr = indptr.data();
  t.bits = bits.data();
  t.words = words;
  t.row_begin = rows > 2 ? 1 : 0;
  t.row_end = rows;
  t.y = y.data();
  t.bias = bias ? b.data() : nullptr;
  t.activation = activation;
  kernel(t);
  y.check("the output");
  for (int64_t r = 0; r < rows; ++r) {
    if (r < t.row_begin) {
      expect_untouched(y[r], "output", r);
      continue;
    }
    Sum sum;
    if (bias) sum.add(b[r]);
    for (int32_t i = m.indptr[r]; i < m.indptr[r + 1]; ++i) sum.add(values[i], x[m.columns[i]]);
    expect(y[r], activated(sum.value, activation), forward_bound<T>(sum, activation), "output", r);
  }
}

template <class T>
void check_transpose_case(dass::TransposeFn<T> kernel, int64_t rows, int64_t columns, Random& random) {
  const int64_t lds = columns + random.below(4), ldd = rows + random.below(4);
  Guarded<T> src((rows - 1) * lds + columns), dst((columns - 1) * ldd + rows);
  src.fill(random);
  kernel(src.data(), lds, dst.data(), ldd, rows, columns);
  dst.check("the transpose");
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < ldd && j * ldd + i < dst.size(); ++i) {
      if (i < rows)
        expect(dst[j * ldd + i], src[i * lds + j], 0, "transpose", j * ldd + i);
      else
        expect_untouched(dst[j * ldd + i], "transpose", j * ldd + i);
    }
}

}  // namespace

template <class T>
int64_t check_sddmm(const dass::Kernels<T>& kernels, const std::string& name) {
  int64_t done = 0;
  for (int a = 0; a < dass::kAddresses; ++a)
    for (int v = 1; v <= dass::kMaxSddmmVectors; ++v) {
      const dass::SddmmFn<T> kernel = kernels.sddmm[a][v - 1];
      if (!kernel) continue;
      Random random(++done);
      for (const int block : kBlocks) {
        current() =
            name + " sddmm " + kAddressNames[a] + " " + std::to_string(block) + "x1, " + std::to_string(v) + " vectors";
        for (int i = 0; i < 4; ++i) check_sddmm_case(kernel, a, block, v * kernels.lanes, i != 0, random);
      }
    }
  return done;
}

template <class T>
int64_t check_gemv(const dass::Kernels<T>& kernels, const std::string& name) {
  if (!kernels.gemv) return 0;
  Random random(1);
  for (int64_t rows = 1; rows < 40; ++rows)
    for (const int64_t columns : {int64_t{1}, int64_t{15}, int64_t{16}, int64_t{17}, int64_t{37}, int64_t{64}})
      for (int i = 0; i < 8; ++i) {
        current() = name + " gemv, " + std::to_string(rows) + " rows of " + std::to_string(columns);
        check_gemv_case(kernels.gemv, rows, columns, static_cast<dass::Activation>(i >> 1), (i & 1) != 0, random);
      }
  return 1;
}

template <class T>
int64_t check_transpose(const dass::Kernels<T>& kernels, const std::string& name) {
  Random random(1);
  for (int64_t rows = 1; rows < 36; ++rows)
    for (int64_t columns = 1; columns < 36; ++columns) {
      current() = name + " transpose, " + std::to_string(rows) + " x " + std::to_string(columns);
      check_transpose_case(kernels.transpose, rows, columns, random);
    }
  return 1;
}

template int64_t check_sddmm(const dass::Kernels<float>&, const std::string&);
template int64_t check_sddmm(const dass::Kernels<double>&, const std::string&);
template int64_t check_gemv(const dass::Kernels<float>&, const std::string&);
template int64_t check_gemv(const dass::Kernels<double>&, const std::string&);
template int64_t check_transpose(const dass::Kernels<float>&, const std::string&);
template int64_t check_transpose(const dass::Kernels<double>&, const std::string&);

}  // namespace checks
