// The part of CUDA C++ that csrc/cuda uses, for a plain C++ compiler: kernels run on the processor,
// one fiber per thread. Found in the place of CUDA's own header by the order of include paths.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// What CUDA has syntax for, csrc/cuda/launch.cuh gives a name.
#define DASS_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), shim::Block::get().launch(grid, block, [=] { kernel(__VA_ARGS__); }))
#define DASS_SHARED(type, name, dims)                                                     \
  using name##_shared [[maybe_unused]] = type dims;                                       \
  static_assert(std::is_trivially_copyable_v<type>, "shared memory runs no constructor"); \
  name##_shared& name = shim::Block::get().shared<name##_shared>(__FILE__, __LINE__)

#define __syncthreads() shim::Block::get().barrier(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = ~0u) { shim::Block::get().exchange("__syncwarp", mask, 0); }
[[noreturn]] inline void __trap() { shim::Block::get().fail("__trap"); }

namespace shim {
template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// The value of lane `source` of a group of `width` lanes; a source outside gives one's own.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, int width) {
  Block& b = Block::get();
  const int lane = b.lane(), first = lane / width * width;
  const uint64_t* all = b.exchange(name, mask, to_bits(value));
  const int from = source < first || source >= first + width ? lane : source;
  if (!(mask >> from & 1)) b.fail(std::string(name) + ": reads a lane that is not in the mask");
  return from_bits<T>(all[from]);
}
}  // namespace shim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = shim::Block::get().lane();
  return shim::shuffle("__shfl_sync", mask, value, lane / width * width + source % width, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return shim::shuffle("__shfl_xor_sync", mask, value, shim::Block::get().lane() ^ bits, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return shim::shuffle("__shfl_up_sync", mask, value, shim::Block::get().lane() - static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return shim::shuffle("__shfl_down_sync", mask, value, shim::Block::get().lane() + static_cast<int>(delta), width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = shim::Block::get().exchange("__ballot_sync", mask, predicate != 0);
  unsigned result = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) result |= static_cast<unsigned>(all[l]) << l;
  return result;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  const T old = *p;
  *p = old < value ? value : old;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

struct alignas(16) float4 {
  float x, y, z, w;
};

// The host's calls: there is one stream, and it has always caught up.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
