// Kernels with a bug planted in each, to show that the emulation finds it, and the same without.
//
//   planted BUG SEED [fixed]
//
// Ends with 0 if the result is right, 2 if it is wrong, 3 if the emulation refused; the sanitizers
// end it as they do.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

using dass::cuda::Vec4;

namespace {

constexpr int kThreads = 64;

// Four at a time, also where fewer are left.
template <bool kBug>
__global__ void tail(const float* x, float* y, int n) {
  const int i = 4 * static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (kBug ? i < n : i + 4 <= n)
    *reinterpret_cast<Vec4<float>*>(y + i) = *reinterpret_cast<const Vec4<float>*>(x + i);
  else
    for (int j = i; j < n; ++j) y[j] = x[j];
}

// Of the shared array only the first part is written.
template <bool kBug>
__global__ void uninitialised(const float* x, float* y, int n) {
  DASS_SHARED(float, tile, [kThreads]);
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * kThreads + t;
  if (!kBug || t < kThreads / 2) tile[t] = i < n ? x[i] : 0.f;
  __syncthreads();
  const float doubled = tile[t] + tile[kThreads - 1 - t] - tile[kThreads - 1 - t];
  if (i < n) y[i] = doubled;
}

// Some threads never come to the barrier.
template <bool kBug>
__global__ void barrier(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (kBug && i >= n) return;
  __syncthreads();
  if (i < n) y[i] = x[i];
}

// Two barriers that only look like one.
template <bool kBug>
__global__ void two_barriers(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (kBug && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (i < n) y[i] = x[i];
}

// A neighbour's number is read before it is known to be there.
template <bool kBug>
__global__ void race(const float* x, float* y, int n) {
  DASS_SHARED(float, tile, [kThreads]);
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * kThreads + t;
  tile[t] = i < n ? x[i] : 0.f;
  if (!kBug) __syncthreads();
  const float other = tile[t ^ 33];
  if (i < n) y[i] = x[i] + other - other;
}

// A shuffle that half of the named lanes never reach.
template <bool kBug>
__global__ void warp(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  float v = i < n ? x[i] : 0.f;
  if (!kBug || threadIdx.x % 2) v += __shfl_xor_sync(0xffffffffu, v, 1) * 0.f;
  if (i < n) y[i] = v;
}

// A vector where only a scalar may be read.
template <bool kBug>
__global__ void misaligned(const float* x, float* y, int n) {
  const int i = 4 * static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int shift = kBug ? 1 : 0;
  if (i + 8 <= n) {
    const Vec4<float> v = *reinterpret_cast<const Vec4<float>*>(x + i + shift);
    for (int j = 0; j < 4; ++j) y[i + j] = v.v[j];
  } else {
    for (int j = i; j < n && j < i + 4; ++j) y[j] = x[j];
  }
}

// One row too many of shared memory.
template <bool kBug>
__global__ void shared_bounds(const float* x, float* y, int n) {
  DASS_SHARED(float, tile, [kThreads]);
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * kThreads + t;
  float* at = tile + t + (kBug ? 1 : 0);
  *at = i < n ? x[i] : 0.f;
  __syncthreads();
  if (i < n) y[i] = *at;
}

// A block that counts on another one having run.
template <bool kBug>
__global__ void unordered_blocks(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= n) return;
  y[i] = x[i];
  if (kBug && blockIdx.x > 0) y[i] += 0.f * y[i - kThreads];
}

using Kernel = void (*)(const float*, float*, int);
struct Bug {
  const char* name;
  Kernel planted, fixed;
};
const Bug kBugs[] = {
    {"tail", &tail<true>, &tail<false>},
    {"uninitialised", &uninitialised<true>, &uninitialised<false>},
    {"barrier", &barrier<true>, &barrier<false>},
    {"two_barriers", &two_barriers<true>, &two_barriers<false>},
    {"race", &race<true>, &race<false>},
    {"warp", &warp<true>, &warp<false>},
    {"misaligned", &misaligned<true>, &misaligned<false>},
    {"shared_bounds", &shared_bounds<true>, &shared_bounds<false>},
    {"unordered_blocks", &unordered_blocks<true>, &unordered_blocks<false>},
};

// y must become a copy of x, and starts as NaN.
int run(const Bug& bug, bool fixed) {
  constexpr int kCount = 301;
  std::vector<float> x(kCount), y(kCount, __builtin_nanf(""));
  for (int i = 0; i < kCount; ++i) x[i] = static_cast<float>(i + 1);
  const Kernel kernel = fixed ? bug.fixed : bug.planted;
  const float* from = x.data();
  float* to = y.data();
  int count = kCount;
  DASS_LAUNCH(kernel, dim3((kCount + kThreads - 1) / kThreads), dim3(kThreads), nullptr, from, to, count);
  for (int i = 0; i < kCount; ++i)
    if (!(y[i] == x[i])) {
      std::printf("wrong at %d: %g\n", i, y[i]);
      return 2;
    }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 1;
  shim::Block::get().seed = std::strtoull(argv[2], nullptr, 10);
  for (const Bug& bug : kBugs) {
    if (std::strcmp(bug.name, argv[1])) continue;
    try {
      return run(bug, argc > 3);
    } catch (const std::exception& e) {
      std::printf("%s\n", e.what());
      return 3;
    }
  }
  return 1;
}
