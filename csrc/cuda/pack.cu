// Packing on the device: the pattern tensor of a mask, as dass_kernels/formats.py lays it out for
// format csr, word for word but for the optional bit mask.
//
// Rows and channels are counted, the counts summed up, and every warp then writes one row of each
// order. Nothing depends on the order of threads.
#include "../ops/pattern_words.h"
#include "kernels.h"
#include "launch.cuh"

namespace dass::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// The mask as two lists of kept places: by output (places are columns), or by input channel (places
// are output in its group * taps + mirrored tap).
struct Mask {
  const uint8_t* kept;
  int outputs, columns, taps, groups;

  __device__ int group_outputs() const { return outputs / groups; }
  __device__ int group_channels() const { return columns / taps; }
  __device__ int lists(bool by_channel) const { return by_channel ? group_channels() * groups : outputs; }
  __device__ int places(bool by_channel) const { return by_channel ? group_outputs() * taps : columns; }
  __device__ int output(int channel, int place) const {
    return channel / group_channels() * group_outputs() + place / taps;
  }
  __device__ int column(int channel, int place) const {
    return channel % group_channels() * taps + taps - 1 - place % taps;
  }
  __device__ bool at(int output, int column) const { return kept[static_cast<int64_t>(output) * columns + column]; }
  __device__ bool has(bool by_channel, int list, int place) const {
    return by_channel ? at(output(list, place), column(list, place)) : at(list, place);
  }
};

// starts[i + 1] = kept places of list i: a warp per list.
__global__ void __launch_bounds__(kThreads) count_kernel(Mask mask, bool by_channel, int32_t* starts) {
  const int list = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (list >= mask.lists(by_channel)) return;
  int count = 0;
  for (int first = 0; first < mask.places(by_channel); first += kWarpSize) {
    const int place = first + lane;
    const bool kept = place < mask.places(by_channel) && mask.has(by_channel, list, place);
    count += __popc(__ballot_sync(kAllLanes, kept));
  }
  if (lane == 0) starts[list + 1] = count;
}

// Counts to row pointers, in place; one block for all of a list.
__global__ void __launch_bounds__(kThreads) scan_kernel(int32_t* starts, int count) {
  DASS_SHARED(int32_t, sums, [kThreads]);
  const int t = static_cast<int>(threadIdx.x);
  int32_t carry = 0;
  if (t == 0) starts[0] = 0;
  for (int first = 0; first < count; first += kThreads) {
    sums[t] = first + t < count ? starts[first + t + 1] : 0;
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {
      const int32_t before = t >= step ? sums[t - step] : 0;
      __syncthreads();
      sums[t] += before;
      __syncthreads();
    }
    if (first + t < count) starts[first + t + 1] = carry + sums[t];
    carry += sums[kThreads - 1];
    __syncthreads();
  }
}

// The header, and both lists of row pointers.
__global__ void __launch_bounds__(kThreads)
    head_kernel(Mask mask, const int32_t* starts, int32_t kept, int32_t length, int32_t* pattern) {
  const int rows = mask.outputs + 1, channels = mask.lists(true) + 1;
  const int indptr = kHeaderWords, indices = indptr + rows, t_indptr = indices + kept, t_indices = t_indptr + channels;
  const int stride = static_cast<int>(gridDim.x) * kThreads;
  const int first = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  for (int i = first; i < rows; i += stride) pattern[indptr + i] = starts[i];
  for (int i = first; i < channels; i += stride) pattern[t_indptr + i] = starts[rows + i];
  if (first) return;
  pattern[kMagic] = kPatternMagic;
  pattern[kBlock] = 1;
  pattern[kOutputs] = mask.outputs;
  pattern[kColumns] = mask.columns;
  pattern[kTaps] = mask.taps;
  pattern[kGroups] = mask.groups;
  pattern[kEntries] = pattern[kElements] = kept;
  pattern[kIndptrAt] = indptr;
  pattern[kIndicesAt] = indices;
  pattern[kTIndptrAt] = t_indptr;
  pattern[kTIndicesAt] = t_indices;
  pattern[kPermAt] = t_indices + kept;
  pattern[kBitsAt] = 0;
  pattern[kLength] = length;
  pattern[kFlatAt] = t_indices + 2 * kept;
}

// Place of a kept weight in values: its column is looked for in its row.
__device__ inline int value_of(const int32_t* indptr, const int32_t* indices, int output, int column) {
  int low = indptr[output], high = indptr[output + 1] - 1;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (indices[middle] < column)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The places of every list in rising order, and what goes with them; a warp per list. By output
// must be done before by channel.
__global__ void __launch_bounds__(kThreads) fill_kernel(Mask mask, bool by_channel, int32_t* pattern) {
  const int list = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (list >= mask.lists(by_channel)) return;
  const int32_t* indptr = pattern + pattern[kIndptrAt];
  int32_t* indices = pattern + pattern[kIndicesAt];
  int32_t* places = by_channel ? pattern + pattern[kTIndicesAt] : indices;
  int32_t* partner = pattern + pattern[by_channel ? kPermAt : kFlatAt];
  int at = by_channel ? pattern[pattern[kTIndptrAt] + list] : indptr[list];
  for (int first = 0; first < mask.places(by_channel); first += kWarpSize) {
    const int place = first + lane;
    const bool kept = place < mask.places(by_channel) && mask.has(by_channel, list, place);
    const unsigned ballot = __ballot_sync(kAllLanes, kept);
    if (kept) {
      const int to = at + __popc(ballot & ((1u << lane) - 1));
      places[to] = place;
      partner[to] = by_channel ? value_of(indptr, indices, mask.output(list, place), mask.column(list, place))
                               : list * mask.columns + place;
    }
    at += __popc(ballot);
  }
}

Mask mask_of(const PackArguments& a) { return {a.mask, a.outputs, a.columns, a.taps, a.groups}; }

int channels_of(const PackArguments& a) { return a.columns / a.taps * a.groups; }

dim3 warps_for(int lists) { return dim3(static_cast<unsigned>((lists + kWarps - 1) / kWarps)); }

}  // namespace

const char* count_kept(const PackArguments& a, int32_t* kept_on_host, void* stream) {
  const int sizes[] = {a.outputs, channels_of(a)};
  int32_t* starts = a.starts;
  for (int by_channel = 0; by_channel < 2; ++by_channel) {
    const int count = sizes[by_channel];
    if (count) DASS_LAUNCH(count_kernel, warps_for(count), dim3(kThreads), stream, mask_of(a), by_channel != 0, starts);
    DASS_LAUNCH(scan_kernel, dim3(1), dim3(kThreads), stream, starts, count);
    starts += count + 1;
  }
  if (const char* error = launch_error()) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemcpyAsync(kept_on_host, a.starts + a.outputs, sizeof(int32_t), cudaMemcpyDeviceToHost, s);
  if (error == cudaSuccess) error = cudaStreamSynchronize(s);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t pattern_length(const PackArguments& a, int64_t kept) {
  return kHeaderWords + static_cast<int64_t>(a.outputs) + 1 + channels_of(a) + 1 + 4 * kept;
}

const char* fill_pattern(const PackArguments& a, int32_t kept, int32_t* pattern, void* stream) {
  const int channels = channels_of(a);
  const auto length = static_cast<int32_t>(pattern_length(a, kept));
  const int32_t* starts = a.starts;
  DASS_LAUNCH(head_kernel, dim3(1 + (a.outputs + channels) / 4096), dim3(kThreads), stream, mask_of(a), starts, kept,
              length, pattern);
  if (kept) {
    DASS_LAUNCH(fill_kernel, warps_for(a.outputs), dim3(kThreads), stream, mask_of(a), false, pattern);
    DASS_LAUNCH(fill_kernel, warps_for(channels), dim3(kThreads), stream, mask_of(a), true, pattern);
  }
  return launch_error();
}

}  // namespace dass::cuda
