// Compiled once per instruction set, with DASS_ISA_NAME and the flags of that set.
#include "kernels.h"

#include "gemv.inl.h"
#include "sddmm.inl.h"
#include "spmm.inl.h"
#include "transpose.inl.h"

namespace dass {
namespace DASS_ISA_NAME {

// Vectors of accumulators a tile may hold, per block size. AVX-512 and NEON have 32 registers; the
// others 16, so a tall block is done in several passes over its nonzeros.
#if defined(DASS_ISA_AVX512) || defined(DASS_ISA_NEON)
constexpr int kPass4 = 4, kPass8 = 8, kPass16 = 16;
constexpr int kWide[kBlockSizes] = {8, 6, 3, 1};
#elif defined(DASS_ISA_AVX2)
constexpr int kPass4 = 4, kPass8 = 4, kPass16 = 4;
constexpr int kWide[kBlockSizes] = {8, 2, 2, 2};
#else
constexpr int kPass4 = 4, kPass8 = 4, kPass16 = 4;
constexpr int kWide[kBlockSizes] = {8, 2, 2, 2};
#endif

template <class T, int Slot, int V, bool Table>
constexpr SpmmFn<T> spmm_fn() {
  if constexpr (V > kWide[Slot])
    return nullptr;
  else if constexpr (Slot == 0)
    return &spmm_csr<T, V, Table>;
  else if constexpr (Slot == 1)
    return &spmm_block<T, 4, kPass4, V, Table>;
  else if constexpr (Slot == 2)
    return &spmm_block<T, 8, kPass8, V, Table>;
  else
    return &spmm_block<T, 16, kPass16, V, Table>;
}

template <class T, int V>
constexpr void fill(Kernels<T>& k) {
  k.spmm[0][V - 1] = spmm_fn<T, 0, V, false>();
  k.spmm[1][V - 1] = spmm_fn<T, 1, V, false>();
  k.spmm[2][V - 1] = spmm_fn<T, 2, V, false>();
  k.spmm[3][V - 1] = spmm_fn<T, 3, V, false>();
  k.conv[0][V - 1] = spmm_fn<T, 0, V, true>();
  k.conv[1][V - 1] = spmm_fn<T, 1, V, true>();
  k.conv[2][V - 1] = spmm_fn<T, 2, V, true>();
  k.conv[3][V - 1] = spmm_fn<T, 3, V, true>();
  if constexpr (V > 1) fill<T, V - 1>(k);
}

template <class T, int V>
constexpr void fill_sddmm(Kernels<T>& k) {
  k.sddmm[V - 1] = &sddmm<T, V, false>;
  k.sddmm_conv[V - 1] = &sddmm<T, V, true>;
  if constexpr (V > 1) fill_sddmm<T, V - 1>(k);
}

template <class T>
constexpr Kernels<T> make_kernels() {
  Kernels<T> k{};
  k.lanes = Vec<T>::lanes;
  for (int s = 0; s < kBlockSizes; ++s) k.max_vectors[s] = kWide[s];
  fill<T, kMaxVectors>(k);
  fill_sddmm<T, kMaxSddmmVectors>(k);
  k.transpose = &transpose<T>;
  return k;
}

#if defined(DASS_ISA_AVX512)
void gemv(const GemvTile<float>& t) { gemv_all(t); }
#endif

constexpr KernelTable make_table() {
  KernelTable t{};
  t.isa = DASS_ISA_STRING;
  t.f32 = make_kernels<float>();
  t.f64 = make_kernels<double>();
#if defined(DASS_ISA_AVX512)
  t.f32.gemv = &gemv;
#endif
  return t;
}

}  // namespace DASS_ISA_NAME

extern const KernelTable DASS_ISA_TABLE;
const KernelTable DASS_ISA_TABLE = DASS_ISA_NAME::make_table();

}  // namespace dass
