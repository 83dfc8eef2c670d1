// Sparse rows times a panel of pixels: the product behind 1x1, k x k and Linear layers.
//
// Per nonzero and V vectors: one broadcast, V loads fused into V multiply-adds. The inner loop is
// bound by the load ports (V + 1 loads for V FMAs), so wide tiles win until the panel leaves L1.
// With R x 1 blocks each load feeds R multiply-adds and the bound moves to the FMA units.
#pragma once
#include "activation.inl.h"
#include "kernels.h"
#include "vec.h"

namespace dass {
namespace DASS_ISA_NAME {

// Keeps `n` lanes: they are the first ones once masked lanes have been compressed away.
template <class T>
DASS_INLINE void finish(Vec<T> v, int n, T* y, const T* residual, Activation activation) {
  if (n == Vec<T>::lanes) {
    if (residual) v = v + Vec<T>::load(residual);
    activate(v, activation).store(y);
  } else {
    if (residual) v = v + Vec<T>::load_n(residual, n);
    activate(v, activation).store_n(y, n);
  }
}

template <class T, int V, int Run = first_run(V)>
DASS_INLINE void store_row(const SpmmTile<T>& t, const Vec<T>* acc, int64_t row) {
  constexpr int lanes = Vec<T>::lanes;
  if (t.rows) row = t.rows[row];
  T* y = t.y + row * t.ldy;
  const T* residual = t.residual ? t.residual + row * t.ldr : nullptr;
  if (t.masks && !t.outs) {
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
      Vec<T> sum = residual ? acc[v] + Vec<T>::load(residual + v * lanes) : acc[v];
      activate(sum, t.activation).keep(t.masks[v]).store(y + v * lanes);
    }
    return;
  }
  if (t.masks) {
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
      const uint32_t mask = t.masks[v];
      const int n = __builtin_popcount(mask);
      const int64_t at = t.outs[v];
      const T* add = residual ? residual + at : nullptr;
      if (n == lanes)
        finish<T>(acc[v], lanes, y + at, add, t.activation);
      else if (n)
        finish<T>(acc[v].compress(mask), n, y + at, add, t.activation);
    }
    return;
  }
#pragma GCC unroll 32
  for (int v = 0; v < V; ++v) {
    const int64_t at = v / Run * t.out_gap + v % Run * lanes;
    finish<T>(acc[v], v < V - 1 ? lanes : t.tail, y + at, residual ? residual + at : nullptr, t.activation);
  }
}

// Multiplying beats a table of offsets by 8-10 % when the pitch is constant: one fewer load in a loop
// that is bound by loads.
template <class T, int A>
DASS_INLINE const T* column(const T* x, const int32_t* offsets, int64_t pitch, int32_t index) {
  if constexpr (A == kTable) return x + offsets[index];
  if constexpr (A == kDirect) return x + index;
  return x + static_cast<int64_t>(index) * pitch;
}

// A multiply-add takes four cycles and two can start in each, so narrow tiles sum several entries
// side by side: eight sums in flight keep the units busy (V = 1: 3.4 -> 1.3 cycles an entry).
constexpr int chains(int vectors) { return vectors >= 5 ? 1 : vectors >= 3 ? 2 : 4; }

// Vector v of a column's pixels.
template <class T, int Run>
DASS_INLINE Vec<T> pixels(const T* p, int64_t gap, int v) {
  return Vec<T>::load(p + v / Run * gap + v % Run * Vec<T>::lanes);
}

// acc += entries [i, end) times their columns. `more(i)` says whether entry i belongs to this call.
template <class T, int V, int A, int Run, class More>
DASS_INLINE int32_t accumulate(const SpmmTile<T>& t, Vec<T>* acc, int32_t i, int32_t end, More more) {
  constexpr int N = chains(V);
  const T* const x = t.x;
  const T* const values = t.values;
  const int32_t* const indices = t.indices;
  const int32_t* const offsets = t.offsets;
  const int64_t pitch = t.pitch, gap = t.gap;
  if constexpr (N > 1) {
    Vec<T> side[N - 1][V];
#pragma GCC unroll 4
    for (int n = 0; n < N - 1; ++n)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) side[n][v] = Vec<T>::zero();
    for (; i + N <= end && more(i + N - 1); i += N) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const T* p = column<T, A>(x, offsets, pitch, indices[i + n]);
        const Vec<T> w = Vec<T>::set1(values[i + n]);
        Vec<T>* sum = n ? side[n - 1] : acc;
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) sum[v].fma(w, pixels<T, Run>(p, gap, v));
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N - 1; ++n)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) acc[v] = acc[v] + side[n][v];
  }
  for (; i < end && more(i); ++i) {
    const T* p = column<T, A>(x, offsets, pitch, indices[i]);
    const Vec<T> w = Vec<T>::set1(values[i]);
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) acc[v].fma(w, pixels<T, Run>(p, gap, v));
  }
  return i;
}

template <class T, int V, int A, int Run = first_run(V)>
void spmm_csr(const SpmmTile<T>& t) {
  for (int64_t row = t.row_begin; row < t.row_end; ++row) {
    Vec<T> acc[V];
    const Vec<T> start = t.bias ? Vec<T>::set1(t.bias[row]) : Vec<T>::zero();
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) acc[v] = start;
    accumulate<T, V, A, Run>(t, acc, t.indptr[row], t.indptr[row + 1], [](int32_t) { return true; });
    store_row<T, V, Run>(t, acc, row);
  }
}

// The same over one block of columns whose pixels fit in L1. A row must hold enough entries of the
// block to pay for passing its sums on: one load and one store per vector.
template <class T, int V, int A, int Run = first_run(V)>
void spmm_csr_blocked(const SpmmTile<T>& t) {
  constexpr int lanes = Vec<T>::lanes;
  const int32_t* const indices = t.indices;
  const int32_t limit = t.limit;
  for (int64_t row = t.row_begin; row < t.row_end; ++row) {
    Vec<T> acc[V];
    T* const partial = t.partial + (row - t.row_begin) * V * lanes;
    if (t.first) {
      const Vec<T> start = t.bias ? Vec<T>::set1(t.bias[row]) : Vec<T>::zero();
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) acc[v] = start;
    } else {
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) acc[v] = Vec<T>::load(partial + v * lanes);
    }
    const int32_t begin = t.first ? t.indptr[row] : t.cursors[row - t.row_begin];
    const int32_t i = accumulate<T, V, A, Run>(t, acc, begin, t.indptr[row + 1],
                                               [indices, limit](int32_t at) { return indices[at] < limit; });
    if (t.last) {
      store_row<T, V, Run>(t, acc, row);
    } else {
      t.cursors[row - t.row_begin] = i;
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) acc[v].store(partial + v * lanes);
    }
  }
}

// R outputs share a pattern; `Pass` of them are held in registers at a time.
template <class T, int R, int Pass, int V, int A>
void spmm_block(const SpmmTile<T>& t) {
  constexpr int lanes = Vec<T>::lanes;
  static_assert(R % Pass == 0, "a block is done in whole passes");
  for (int64_t block = t.row_begin; block < t.row_end; ++block) {
    const int32_t begin = t.indptr[block];
    const int32_t end = t.indptr[block + 1];
    for (int pass = 0; pass < R; pass += Pass) {
      const int64_t row0 = block * R + pass;
      if (row0 >= t.outputs) break;
      Vec<T> acc[Pass][V];
#pragma GCC unroll 32
      for (int r = 0; r < Pass; ++r) {
        const int64_t row = row0 + r < t.outputs ? row0 + r : row0;
        const Vec<T> start = t.bias ? Vec<T>::set1(t.bias[row]) : Vec<T>::zero();
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) acc[r][v] = start;
      }
      for (int32_t i = begin; i < end; ++i) {
        const T* p = column<T, A>(t.x, t.offsets, t.pitch, t.indices[i]);
        const T* w = t.values + static_cast<int64_t>(i) * R + pass;
        Vec<T> xs[V];
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) xs[v] = Vec<T>::load(p + v * lanes);
#pragma GCC unroll 32
        for (int r = 0; r < Pass; ++r) {
          const Vec<T> wr = Vec<T>::set1(w[r]);
#pragma GCC unroll 32
          for (int v = 0; v < V; ++v) acc[r][v].fma(wr, xs[v]);
        }
      }
#pragma GCC unroll 32
      for (int r = 0; r < Pass; ++r)
        if (row0 + r < t.outputs) store_row<T, V>(t, acc[r], row0 + r);
    }
  }
}

}  // namespace DASS_ISA_NAME
}  // namespace dass
