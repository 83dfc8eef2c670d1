// spmm and its form in blocks of columns, against a plain loop in double.
#include <algorithm>
#include <memory>

#include "checks.h"

namespace checks {
namespace {

using dass::Activation;
using dass::SpmmTile;

// A matrix, and where its columns lie: each starts some elements after the one before, so that, as those
// of a convolution's taps do, they share most of their pixels.
template <class T>
struct Problem {
  int block, vectors, lanes, run;  // run: vectors side by side
  int64_t outputs;
  Rows rows;
  std::vector<int32_t> starts;  // of the columns
  std::unique_ptr<Guarded<int32_t>> indptr, indices, offsets;
  std::unique_ptr<Guarded<T>> values, bias;
  int64_t pitch = 0;
  int64_t gap, out_gap;

  // Element of lane `lane` of vector v, from where its column starts.
  int64_t pixel(int v, int lane) const { return v / run * gap + v % run * lanes + lane; }
};

constexpr int64_t kColumns = 14;

template <class T>
Problem<T> make_problem(int lanes, int address, int block, int vectors, int run, Random& random) {
  Problem<T> p;
  p.block = block;
  p.vectors = vectors;
  p.run = run;
  p.lanes = lanes;
  // The last block is short. Single rows go through every length up to all columns.
  const int64_t block_rows = block == 1 ? kColumns + 3 : 4;
  p.outputs = block == 1 ? block_rows : block_rows * block - 1 - random.below(block - 1);
  p.rows = random_rows(block_rows, kColumns, random);
  if (block > 1) p.rows = random_rows(block_rows, 3, random);
  p.gap = p.run * lanes + random.below(9);
  p.out_gap = p.run * lanes + random.below(9);
  if (address == dass::kPitch) p.pitch = 1 + random.below(2 * lanes);
  for (int64_t c = 0, at = 0; c < kColumns; ++c) {
    p.starts.push_back(static_cast<int32_t>(at));
    at += address == dass::kPitch ? p.pitch : 1 + random.below(5);
  }
  std::vector<int32_t> indices = p.rows.columns;
  if (address == dass::kDirect)
    for (int32_t& i : indices) i = p.starts[i];
  p.indptr = std::make_unique<Guarded<int32_t>>(block_rows + 1);
  p.indices = std::make_unique<Guarded<int32_t>>(indices.size());
  p.offsets = std::make_unique<Guarded<int32_t>>(kColumns);
  copy_to(*p.indptr, p.rows.indptr);
  copy_to(*p.indices, indices);
  copy_to(*p.offsets, p.starts);
  p.values = std::make_unique<Guarded<T>>(indices.size() * block);
  p.bias = std::make_unique<Guarded<T>>(p.outputs);
  p.values->fill(random);
  p.bias->fill(random);
  return p;
}

// Which lanes are kept and where they go, from the start of a row of outputs.
struct Stores {
  std::vector<uint32_t> kept;  // by vector: the lanes
  std::vector<int32_t> outs;   // by vector: where its first kept lane goes
  int64_t width;               // elements of a row of outputs
  int tail;
  bool masked;
  bool zeros = false;  // lanes that are not kept stay where they are, as zeros
};

template <class T>
Stores plain_stores(const Problem<T>& p, int tail) {
  Stores s{{}, {}, 0, tail, false};
  for (int v = 0; v < p.vectors; ++v) {
    const int n = v == p.vectors - 1 ? tail : p.lanes;
    s.kept.push_back((1u << n) - 1u);
    s.outs.push_back(static_cast<int32_t>(v / p.run * p.out_gap + v % p.run * p.lanes));
  }
  s.width = s.outs.back() + tail;
  return s;
}

template <class T>
Stores masked_stores(const Problem<T>& p, Random& random) {
  Stores s{{}, {}, 0, -1, true};
  const uint32_t all = (1u << p.lanes) - 1u;
  for (int v = 0; v < p.vectors; ++v) {
    const int64_t kind = random.below(4);
    const uint32_t mask = kind == 0 ? all : kind == 1 ? 0u : static_cast<uint32_t>(random.bits()) & all;
    s.width += random.below(3);
    s.kept.push_back(mask);
    s.outs.push_back(static_cast<int32_t>(s.width));
    s.width += __builtin_popcount(mask);
  }
  s.width = std::max<int64_t>(s.width, 1);
  return s;
}

template <class T>
Stores zeroing_stores(const Problem<T>& p, Random& random) {
  Stores s = masked_stores(p, random);
  s.zeros = true;
  s.width = p.vectors * p.lanes;
  for (int v = 0; v < p.vectors; ++v) s.outs[v] = v * p.lanes;
  return s;
}

// NaN but for the elements that a kept lane reads; the kernel loads whole vectors. `special` is put into
// one that counts.
template <class T>
void fill_input(Guarded<T>& x, const Problem<T>& p, const Stores& s, T special, Random& random) {
  for (const int32_t start : p.starts)
    for (int v = 0; v < p.vectors; ++v)
      for (int lane = 0; lane < p.lanes; ++lane) {
        T& at = x[start + p.pixel(v, lane)];
        if (s.kept[v] >> lane & 1u && is_poison(at)) at = random.number<T>() * 2;
      }
  if (special != 0)
    for (int64_t i = random.below(x.size()), n = 0; n < x.size(); ++n, i = (i + 1) % x.size())
      if (!is_poison(x[i])) {
        x[i] = special;
        break;
      }
}

template <class T>
struct Case {
  bool bias, residual;
  Activation activation;
  int64_t row_begin, row_end;
  T special;
};

// Where outputs go: the row of y for each one, and the distances of rows.
struct Target {
  Guarded<int32_t> rows;
  int64_t ldy, ldr;
};

void shuffle(Guarded<int32_t>& rows, Random& random) {
  for (int64_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
  for (int64_t i = rows.size() - 1; i > 0; --i) std::swap(rows[i], rows[random.below(i + 1)]);
}

template <class T>
void check_row(const Problem<T>& p, const Stores& s, const Case<T>& c, const Guarded<T>& x, const Guarded<T>& residual,
               const Guarded<T>& y, const Target& to, int64_t row) {
  const int64_t block = row / p.block, ldy = to.ldy, begin = to.rows[row] * ldy;
  std::vector<bool> written(ldy);
  for (int v = 0; block >= c.row_begin && block < c.row_end && v < p.vectors; ++v)
    for (int lane = 0, n = 0; lane < p.lanes; ++lane) {
      const bool kept = s.kept[v] >> lane & 1u;
      if (!kept && !s.zeros) continue;
      const int64_t column = s.outs[v] + n++, at = begin + column;
      written[column] = true;
      if (!kept) {
        expect(y[at], 0, 0, "zero", at);
        continue;
      }
      Sum sum;
      if (c.bias) sum.add((*p.bias)[row]);
      if (c.residual) sum.add(residual[to.rows[row] * to.ldr + column]);
      for (int32_t i = p.rows.indptr[block]; i < p.rows.indptr[block + 1]; ++i)
        sum.add((*p.values)[i * p.block + row % p.block], x[p.starts[p.rows.columns[i]] + p.pixel(v, lane)]);
      expect(y[at], activated(sum.value, c.activation), forward_bound<T>(sum, c.activation), "output", at);
    }
  for (int64_t i = 0; i < ldy && begin + i < y.size(); ++i)
    if (!written[i]) expect_untouched(y[begin + i], "output", begin + i);
}

template <class T, class Run>
void check_case(const Problem<T>& p, const Stores& s, const Case<T>& c, Random& random, const Run& run) {
  Guarded<T> x(p.starts.back() + p.pixel(p.vectors - 1, p.lanes - 1) + 1);
  fill_input(x, p, s, c.special, random);
  Target to{Guarded<int32_t>(p.outputs), s.width + random.below(4), s.width + random.below(4)};
  Guarded<T> y((p.outputs - 1) * to.ldy + s.width), residual((p.outputs - 1) * to.ldr + s.width);
  residual.fill(random);
  const bool apart = random.below(2) == 0;
  shuffle(to.rows, random);
  for (int64_t i = 0; i < p.outputs && !apart; ++i) to.rows[i] = static_cast<int32_t>(i);
  SpmmTile<T> t{};
  t.x = x.data();
  t.offsets = p.offsets->data();
  t.pitch = p.pitch;
  t.values = p.values->data();
  t.indices = p.indices->data();
  t.indptr = p.indptr->data();
  t.row_begin = c.row_begin;
  t.row_end = c.row_end;
  t.outputs = p.outputs;
  t.y = y.data();
  t.ldy = to.ldy;
  t.ldr = to.ldr;
  t.rows = apart ? to.rows.data() : nullptr;
  t.bias = c.bias ? p.bias->data() : nullptr;
  t.residual = c.residual ? residual.data() : nullptr;
  t.gap = p.gap;
  t.out_gap = p.out_gap;
  t.masks = s.masked ? s.kept.data() : nullptr;
  t.outs = s.zeros ? nullptr : s.outs.data();
  t.tail = s.tail;
  t.activation = c.activation;
  run(t);
  y.check("the output");
  for (int64_t row = 0; row < p.outputs; ++row) check_row(p, s, c, x, residual, y, to, row);
}

// Every activation with and without bias and residual, every tail, masks, parts of the rows, NaN and
// infinity.
template <class T, class Run>
void check_cases(const Problem<T>& p, Random& random, const Run& run) {
  const int64_t rows = static_cast<int64_t>(p.rows.indptr.size()) - 1;
  for (int i = 0; i < 16; ++i) {
    Case<T> c{(i & 1) != 0, (i & 2) != 0, static_cast<Activation>(i >> 2), 0, rows, T(0)};
    for (int tail = 1; tail <= p.lanes; ++tail) check_case(p, plain_stores(p, tail), c, random, run);
    for (int n = 0; n < 4; ++n) check_case(p, masked_stores(p, random), c, random, run);
    for (int n = 0; n < 4; ++n) check_case(p, zeroing_stores(p, random), c, random, run);
    c.row_begin = 1;
    c.row_end = rows - 1;
    check_case(p, plain_stores(p, p.lanes), c, random, run);
    for (const T special : {poison<T>(), std::numeric_limits<T>::infinity()}) {
      c.special = special;
      check_case(p, plain_stores(p, p.lanes), c, random, run);
      check_case(p, masked_stores(p, random), c, random, run);
      check_case(p, zeroing_stores(p, random), c, random, run);
    }
  }
}

// The columns in blocks: of three, of all but one, and with blocks that hold nothing.
template <class T>
void run_blocks(const Problem<T>& p, int address, dass::SpmmFn<T> kernel, SpmmTile<T> t) {
  const int64_t rows = t.row_end - t.row_begin;
  Guarded<T> partial(rows * p.vectors * p.lanes);
  Guarded<int32_t> cursors(rows);
  t.partial = partial.data();
  t.cursors = cursors.data();
  std::vector<int32_t> ends{3, 6, 6, 13, kColumns};
  for (size_t i = 0; i < ends.size(); ++i) {
    t.first = i == 0;
    t.last = i + 1 == ends.size();
    t.limit = address != dass::kDirect ? ends[i] : ends[i] < kColumns ? p.starts[ends[i]] : p.starts.back() + 1;
    kernel(t);
  }
  partial.check("the sums");
  cursors.check("the cursors");
}

std::string case_name(const std::string& name, const char* family, int address, int block, int vectors) {
  return name + " " + family + " " + kAddressNames[address] + " " + std::to_string(block) + "x1, " +
         std::to_string(vectors) + " vectors";
}

}  // namespace

template <class T>
int64_t check_spmm(const dass::Kernels<T>& kernels, const std::string& name) {
  int64_t done = 0;
  for (int a = 0; a < dass::kAddresses; ++a)
    for (int s = 0; s < dass::kBlockSizes; ++s)
      for (int v = 1; v <= dass::kMaxVectors; ++v) {
        const dass::SpmmFn<T> kernel = kernels.spmm[a][s][v - 1];
        if (!kernel) continue;
        current() = case_name(name, "spmm", a, kBlocks[s], v);
        Random random(++done);
        const Problem<T> p = make_problem<T>(kernels.lanes, a, kBlocks[s], v, dass::first_run(v), random);
        check_cases(p, random, kernel);
      }
  if (!kernels.squares[0]) return done;
  current() = name + " spmm in runs of four";
  Random random(++done);
  check_cases(make_problem<T>(kernels.lanes, dass::kDirect, 1, 16, 4, random), random, kernels.squares[0]);
  return done;
}

template <class T>
int64_t check_blocked(const dass::Kernels<T>& kernels, const std::string& name) {
  int64_t done = 0;
  for (int a = 0; a < dass::kAddresses; ++a)
    for (int v = 1; v <= dass::kMaxVectors; ++v) {
      const dass::SpmmFn<T> kernel = kernels.blocked[a][v - 1];
      if (!kernel) continue;
      current() = case_name(name, "blocked spmm", a, 1, v);
      Random random(++done);
      const Problem<T> p = make_problem<T>(kernels.lanes, a, 1, v, dass::first_run(v), random);
      check_cases(p, random, [&](const SpmmTile<T>& t) { run_blocks(p, a, kernel, t); });
    }
  if (!kernels.squares[1]) return done;
  current() = name + " blocked spmm in runs of four";
  Random random(++done);
  const Problem<T> p = make_problem<T>(kernels.lanes, dass::kDirect, 1, 16, 4, random);
  check_cases(p, random, [&](const SpmmTile<T>& t) { run_blocks(p, dass::kDirect, kernels.squares[1], t); });
  return done;
}

template int64_t check_spmm(const dass::Kernels<float>&, const std::string&);
template int64_t check_spmm(const dass::Kernels<double>&, const std::string&);
template int64_t check_blocked(const dass::Kernels<float>&, const std::string&);
template int64_t check_blocked(const dass::Kernels<double>&, const std::string&);

}  // namespace checks
