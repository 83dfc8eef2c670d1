// The emulation itself: every CUDA operation it stands in for, against plain C++. Prints what is
// wrong and ends with 1, or ends with 0.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/tile.cuh"

namespace {

int failures = 0;

void expect(bool good, const char* what, int at) {
  if (good) return;
  ++failures;
  if (failures < 20) std::printf("%s: wrong at %d\n", what, at);
}

constexpr unsigned kAll = 0xffffffffu;

// Ten results of every thread of a block of 16 x 4 x 2 threads, the last warps in groups of eight.
__global__ void collectives(const int* x, int* y) {
  const int t = static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  const int v = x[t], width = t < 64 ? 32 : 8;
  int* out = y + t * 10;
  out[0] = __shfl_sync(kAll, v, 5, width);
  out[1] = __shfl_xor_sync(kAll, v, 3, width);
  out[2] = __shfl_up_sync(kAll, v, 2u, width);
  out[3] = __shfl_down_sync(kAll, v, 2u, width);
  out[4] = static_cast<int>(__ballot_sync(kAll, v % 3 == 0));
  // Half a warp, each half by itself.
  const unsigned half = t % 32 < 16 ? 0xffffu : 0xffff0000u;
  out[5] = static_cast<int>(__ballot_sync(half, v % 3 == 0));
  out[6] = __popc(static_cast<unsigned>(v));
  DASS_SHARED(int, tile, [128]);
  tile[t] = v;
  __syncthreads();
  out[7] = tile[127 - t];
  __syncthreads();
  tile[127 - t] = 2 * v;
  __syncthreads();
  out[8] = tile[t];
  __syncwarp();
  out[9] = static_cast<int>(__shfl_sync(kAll, 1e300 * v, 1) == 1e300 * x[t / 32 * 32 + 1]);
}

void check_collectives(uint64_t seed) {
  std::vector<int> x(128), y(1280, -1);
  for (int i = 0; i < 128; ++i) x[i] = i * i + 1;
  shim::Block::get().seed = seed;
  const int* from = x.data();
  int* to = y.data();
  auto* kernel = &collectives;
  DASS_LAUNCH(kernel, dim3(2), dim3(16, 4, 2), nullptr, from, to);
  for (int t = 0; t < 128; ++t) {
    const int width = t < 64 ? 32 : 8, first = t / width * width, warp = t / 32 * 32, at = t - first;
    const int* r = &y[t * 10];
    unsigned ballot = 0;
    for (int l = 0; l < 32; ++l) ballot |= static_cast<unsigned>(x[warp + l] % 3 == 0) << l;
    expect(r[0] == x[first + 5], "shfl", t);
    expect(r[1] == x[first + (at ^ 3)], "shfl_xor", t);
    expect(r[2] == x[at < 2 ? t : t - 2], "shfl_up", t);
    expect(r[3] == x[at + 2 < width ? t + 2 : t], "shfl_down", t);
    expect(r[4] == static_cast<int>(ballot), "ballot", t);
    expect(r[5] == static_cast<int>(ballot & (t % 32 < 16 ? 0xffffu : 0xffff0000u)), "ballot of half a warp", t);
    expect(r[6] == __builtin_popcount(static_cast<unsigned>(x[t])), "popc", t);
    expect(r[7] == x[127 - t], "shared memory", t);
    expect(r[8] == 2 * x[127 - t], "shared memory after two barriers", t);
    expect(r[9] == 1, "shuffle of eight bytes", t);
  }
}

__global__ void atomics(int* counter, float* sum, unsigned* largest, int* first) {
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(counter, 1);
  atomicAdd(sum, 0.5f);
  atomicMax(largest, static_cast<unsigned>(t));
  atomicCAS(first, -1, t);
}

void check_atomics(uint64_t seed) {
  int counter = 0, first = -1;
  float sum = 0;
  unsigned largest = 0;
  shim::Block::get().seed = seed;
  int *c = &counter, *f = &first;
  float* s = &sum;
  unsigned* l = &largest;
  auto* kernel = &atomics;
  DASS_LAUNCH(kernel, dim3(3), dim3(40), nullptr, c, s, l, f);
  expect(counter == 120 && sum == 60.f && largest == 119 && first >= 0, "atomics", static_cast<int>(seed));
}

__global__ void vectors(const float* x, float* y) {
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x);
  *reinterpret_cast<float4*>(y + 4 * threadIdx.x) = float4{v.w, v.z, v.y, __ldg(x + 4 * threadIdx.x)};
}

void check_vectors() {
  alignas(16) float x[128], y[128];
  for (int i = 0; i < 128; ++i) x[i] = static_cast<float>(i);
  const float* from = x;
  float* to = y;
  auto* kernel = &vectors;
  DASS_LAUNCH(kernel, dim3(1), dim3(32), nullptr, from, to);
  for (int i = 0; i < 128; ++i) expect(y[i] == x[i / 4 * 4 + 3 - i % 4], "float4", i);
}

#if defined(__FLT16_MAX__)
// Every half to float and back, and floats around every half, against the compiler's own type.
void check_halves() {
  for (int bits = 0; bits < 65536; ++bits) {
    const __half h{static_cast<uint16_t>(bits)};
    _Float16 compiler;
    std::memcpy(&compiler, &h, 2);
    const float f = __half2float(h), want = static_cast<float>(compiler);
    expect(std::memcmp(&f, &want, 4) == 0 || (f != f && want != want), "half to float", bits);
    expect(f != f || __float2half(f).bits == bits, "half to float and back", bits);
    uint32_t around;
    std::memcpy(&around, &f, 4);
    for (const int step : {-4097, -4096, -4095, -1, 1, 4095, 4096, 4097}) {
      const uint32_t near = around + static_cast<uint32_t>(step);
      float g;
      std::memcpy(&g, &near, 4);
      const _Float16 rounded = static_cast<_Float16>(g);
      uint16_t r;
      std::memcpy(&r, &rounded, 2);
      expect(g != g || __float2half(g).bits == r, "float to half", bits);
    }
  }
}
#else
void check_halves() {}
#endif

}  // namespace

int main() {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    check_collectives(seed);
    check_atomics(seed);
  }
  check_vectors();
  check_halves();
  expect(dass::cuda::at_pixel(70000, 1000, 7, 400, 3) == 28000002803ll, "an offset past 32 bits", 0);
  if (failures) std::printf("%d wrong\n", failures);
  return failures ? 1 : 0;
}
