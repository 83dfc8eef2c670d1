// The kernel table: what an instruction set offers, and the arguments of each kernel family.
//
// Kernels take raw pointers and a row range. They neither allocate nor include torch: see vec.h.
#pragma once
#include <cstdint>

namespace dass {

enum Activation : int32_t {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kHardswish = 3,
  // Compiled networks only, and there not in the products' own kernels.
  kHardsigmoid = 4,
  kSigmoid = 5,
  kSilu = 6,
};

// Where the pixels of entry i start, counted in elements from a tile's x.
enum Address : int {
  kPitch = 0,   // indices[i] * pitch
  kTable = 1,   // offsets[indices[i]]: k x k convolutions
  kDirect = 2,  // indices[i] itself, resolved once for many tiles
  kAddresses = 3,
};

// y[r, :] = act(bias[r] + sum_i values[i] * x[entry i, :] + residual[r, :]) for one tile of `V`
// vectors of pixels, r in [row_begin, row_end).
// With blocks of R outputs, rows count block rows and values are [block][R].
template <class T>
struct SpmmTile {
  const T* x;
  const int32_t* offsets;
  int64_t pitch;
  const T* values;
  const int32_t* indices;
  const int32_t* indptr;
  int64_t row_begin;
  int64_t row_end;
  int64_t outputs;  // valid output rows: the last block may be short
  T* y;             // output of row 0; row r starts at y + r * ldy
  int64_t ldy;
  const T* bias;      // by output row, or null
  const T* residual;  // laid out like y, or null; row r starts at residual + r * ldr
  int64_t ldr;
  // Tiles of more than kRunVectors vectors are two runs of pixels, the first with the odd vector, and
  // those of `squares` four: a run starts this many elements after the one before, in x and in y.
  int64_t gap;
  int64_t out_gap;
  // Vector v keeps the lanes in masks[v] and stores them at outs[v]. With `masks` null, the vectors of
  // a run are stored side by side, whole but for the last one, of which `tail` lanes are kept. With
  // `masks` and no `outs` they are stored side by side too, zeros in the lanes that are not kept.
  const uint32_t* masks;
  const int32_t* outs;
  const int32_t* rows;  // where output row r goes, in rows of y; null: to row r
  int32_t tail;
  Activation activation;
  // Column blocks (`blocked` kernels): this call takes the entries whose index is below `limit`, from
  // cursors[row] on, and leaves the cursor at the next one. Sums pass from block to
  // block through partial[row * V * lanes]; the last block stores them to y.
  int32_t limit;
  int32_t* cursors;
  T* partial;
  bool first;
  bool last;
};

// dvalues[i * block + r] += <dy[row(i) * block + r, :], x[column(i), :]> over a tile of `V` vectors:
// the sampled dense-dense product, which is the weight gradient on the mask.
template <class T>
struct SddmmTile {
  const T* x;
  const int32_t* offsets;
  int64_t pitch;
  const T* dy;
  int64_t lddy;
  const int32_t* indices;
  const int32_t* indptr;
  int64_t row_begin;  // block rows
  int64_t row_end;
  int64_t outputs;
  int64_t block;
  T* dvalues;
};

// y[r] = act(bias[r] + sum_k w[r, k] x[k]), weights expanded from a bit mask.
template <class T>
struct GemvTile {
  const T* x;  // zero-padded to a multiple of 16
  const T* values;
  const int32_t* indptr;
  const uint16_t* bits;  // [rows, words]: bit j of word w is column 16 w + j
  int64_t words;
  int64_t row_begin;
  int64_t row_end;
  T* y;
  const T* bias;
  Activation activation;
};

template <class T>
using SpmmFn = void (*)(const SpmmTile<T>&);
template <class T>
using SddmmFn = void (*)(const SddmmTile<T>&);
template <class T>
using GemvFn = void (*)(const GemvTile<T>&);
// dst[j * ldd + i] = src[i * lds + j] for i < rows, j < cols.
template <class T>
using TransposeFn = void (*)(const T* src, int64_t lds, T* dst, int64_t ldd, int64_t rows, int64_t cols);

constexpr int kMaxVectors = 16;       // widest spmm tile, in vectors
constexpr int kMaxSddmmVectors = 16;  // widest sddmm tile, in vectors
constexpr int kRunVectors = 8;        // wider tiles are two runs
constexpr int kBlockSizes = 4;        // index into spmm[]: R = 1, 4, 8, 16

constexpr int first_run(int vectors) { return vectors > kRunVectors ? (vectors + 1) / 2 : vectors; }

constexpr int block_slot(int64_t block) { return block == 1 ? 0 : block == 4 ? 1 : block == 8 ? 2 : 3; }

template <class T>
struct Kernels {
  int lanes;
  int max_vectors[kBlockSizes];
  int max_sddmm;
  // [address][R][vectors - 1]; null past max_vectors and max_sddmm.
  SpmmFn<T> spmm[kAddresses][kBlockSizes][kMaxVectors];
  SpmmFn<T> blocked[kAddresses][kMaxVectors];  // csr only: the same in blocks of columns
  // csr and kDirect only: 16 vectors in runs of four, all columns and in blocks; null where too wide and in double.
  SpmmFn<T> squares[2];
  SddmmFn<T> sddmm[kAddresses][kMaxSddmmVectors];
  GemvFn<T> gemv;  // null where expanding is not worth it
  TransposeFn<T> transpose;
};

struct DenseKernels;

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  const DenseKernels* dense;
};

template <class T>
const Kernels<T>& kernels_of(const KernelTable& table);
template <>
inline const Kernels<float>& kernels_of<float>(const KernelTable& table) {
  return table.f32;
}
template <>
inline const Kernels<double>& kernels_of<double>(const KernelTable& table) {
  return table.f64;
}

}  // namespace dass
