// What csrc/cuda offers to the ops: launchers on raw device pointers. Neither torch nor CUDA is
// included here, so a plain C++ compiler can call them.
//
// Each returns null, or what CUDA says of a launch that failed.
#pragma once
#include <cstdint>

#include "../cpu/kernels.h"

namespace dass::cuda {

enum class Dtype { kFloat, kHalf };

// A convolution, or with every size but n, c and o being 1 a matrix. As in csrc/ops/shape.h, the
// input is read as if uh - 1 zero rows and uw - 1 zero columns stood between its own.
struct Window {
  int n, c, h, w;  // input, c over all groups
  int o, oh, ow;   // output
  int kh, kw, sh, sw, pt, pl, dh, dw, uh, uw;
};

// The pattern tensor on the device and what the host knows of it; kernels trap where they disagree.
struct PatternTensor {
  const int32_t* words;
  int64_t length;
  int64_t value_count;
};

// y[r, j] = act(bias[r] + sum_i values[i] x[column i, j] + residual[r, j]), columns j being the
// output pixels of all images. `transposed`: with the transpose of the pattern's matrix.
struct SpmmArguments {
  Dtype dtype;
  PatternTensor pattern;
  bool transposed;
  Window window;
  const void* x;
  const void* values;
  const void* bias;      // [outputs] or null
  const void* residual;  // like y, or null
  Activation activation;
  void* y;
};
const char* spmm_csr(const SpmmArguments& a, void* stream);

// dvalues[i] = <dy[row i, :], x[column i, :]> over the output pixels of all images, in `splits`
// partial sums.
struct SddmmArguments {
  Dtype dtype;
  PatternTensor pattern;
  Window window;
  const void* x;
  const void* dy;
  float* partial;  // [splits, value_count], zeros
  int splits;
  void* dvalues;  // null: the one partial sum is the result
};
int sddmm_splits(const Window& w);
const char* sddmm_csr(const SddmmArguments& a, void* stream);

// Lays out the pattern of a mask on the device, in two steps, since its size depends on the mask.
struct PackArguments {
  const uint8_t* mask;  // [outputs, columns]
  int outputs, columns, taps, groups;
  int32_t* starts;  // [outputs + 1], then [channels of all groups + 1]: row pointers of both orders
};
const char* count_kept(const PackArguments& a, int32_t* kept_on_host, void* stream);
// The length of the pattern of `kept` weights, and the pattern itself.
int64_t pattern_length(const PackArguments& a, int64_t kept);
const char* fill_pattern(const PackArguments& a, int32_t kept, int32_t* pattern, void* stream);

}  // namespace dass::cuda
