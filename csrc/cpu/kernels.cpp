// Compiled once per instruction set, with DASS_ISA_NAME and the flags of that set.
#include "kernels.h"

#include "dense.inl.h"
#include "gemv.inl.h"
#include "sddmm.inl.h"
#include "spmm.inl.h"
#include "transpose.inl.h"

namespace dass {
namespace DASS_ISA_NAME {

// Vectors a tile may hold, per block size and for sddmm. AVX-512 and NEON have 32 registers; AVX2 has
// 16, so a tall block is done in several passes over its nonzeros. Scalar kernels are for machines
// without any of these and for tests: few widths, so that they compile fast.
#if defined(DASS_ISA_AVX512) || defined(DASS_ISA_NEON)
constexpr int kPass4 = 4, kPass8 = 8, kPass16 = 8;
constexpr int kWide[kBlockSizes] = {16, 6, 3, 3};
constexpr int kWideSddmm = 16;
#elif defined(DASS_ISA_AVX2)
constexpr int kPass4 = 4, kPass8 = 4, kPass16 = 4;
constexpr int kWide[kBlockSizes] = {8, 2, 2, 2};
constexpr int kWideSddmm = 6;
#else
constexpr int kPass4 = 4, kPass8 = 4, kPass16 = 4;
constexpr int kWide[kBlockSizes] = {3, 1, 1, 1};
constexpr int kWideSddmm = 3;
#endif

template <class T, int Slot, int V, int A>
constexpr SpmmFn<T> spmm_fn() {
  if constexpr (V > kWide[Slot] || (A == kPitch && V > kRunVectors))
    return nullptr;
  else if constexpr (Slot == 0)
    return &spmm_csr<T, V, A>;
  else if constexpr (Slot == 1)
    return &spmm_block<T, 4, kPass4, V, A>;
  else if constexpr (Slot == 2)
    return &spmm_block<T, 8, kPass8, V, A>;
  else
    return &spmm_block<T, 16, kPass16, V, A>;
}

template <class T, int A, int V>
constexpr void fill_spmm(Kernels<T>& k) {
  k.spmm[A][0][V - 1] = spmm_fn<T, 0, V, A>();
  k.spmm[A][1][V - 1] = spmm_fn<T, 1, V, A>();
  k.spmm[A][2][V - 1] = spmm_fn<T, 2, V, A>();
  k.spmm[A][3][V - 1] = spmm_fn<T, 3, V, A>();
  if constexpr (V <= kWide[0] && (A != kPitch || V <= kRunVectors)) k.blocked[A][V - 1] = &spmm_csr_blocked<T, V, A>;
  if constexpr (V > 1) fill_spmm<T, A, V - 1>(k);
}

template <class T, int A, int V>
constexpr void fill_sddmm(Kernels<T>& k) {
  k.sddmm[A][V - 1] = &sddmm<T, V, A>;
  if constexpr (V > 1) fill_sddmm<T, A, V - 1>(k);
}

template <class T, int A>
constexpr void fill(Kernels<T>& k) {
  fill_spmm<T, A, kMaxVectors>(k);
  fill_sddmm<T, A, kWideSddmm>(k);
  if constexpr (A > 0) fill<T, A - 1>(k);
}

template <class T>
constexpr Kernels<T> make_kernels() {
  Kernels<T> k{};
  k.lanes = Vec<T>::lanes;
  for (int s = 0; s < kBlockSizes; ++s) k.max_vectors[s] = kWide[s];
  k.max_sddmm = kWideSddmm;
  fill<T, kAddresses - 1>(k);
  k.transpose = &transpose<T>;
  if constexpr (kWide[0] >= 16 && sizeof(T) == sizeof(float)) {  // of compiled networks only
    k.squares[0] = &spmm_csr<T, 16, kDirect, 4>;
    k.squares[1] = &spmm_csr_blocked<T, 16, kDirect, 4>;
  }
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
  t.dense = &kDense;
#if defined(DASS_ISA_AVX512)
  t.f32.gemv = &gemv;
#endif
  return t;
}

}  // namespace DASS_ISA_NAME

extern const KernelTable DASS_ISA_TABLE;
const KernelTable DASS_ISA_TABLE = DASS_ISA_NAME::make_table();

}  // namespace dass
