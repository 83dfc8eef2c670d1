// The sparsity pattern of one weight, as dass_kernels/formats.py lays it out in one int32 tensor.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "pattern_words.h"

namespace dass {

struct Pattern {
  const int32_t* head;
  int64_t block, outputs, columns, taps, groups, entries, elements;
  const int32_t *indptr, *indices, *t_indptr, *t_indices, *perm;
  const uint16_t* bits;

  int64_t block_rows() const { return (outputs + block - 1) / block; }
  int64_t group_channels() const { return columns / taps; }
  int64_t channels() const { return group_channels() * groups; }
  int64_t value_count() const { return entries * block; }
};

// Indices were checked when the pattern was built; here only what could make this read astray.
inline Pattern read_pattern(const torch::stable::Tensor& t, const char* op) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Int && t.dim() == 1 && t.is_contiguous(), op,
                  ": pattern must be a contiguous int32 vector made by dass_kernels.pack");
  const auto* w = static_cast<const int32_t*>(t.const_data_ptr());
  STD_TORCH_CHECK(t.size(0) >= kHeaderWords && w[kMagic] == kPatternMagic && w[kLength] == t.size(0), op,
                  ": pattern is not one made by dass_kernels.pack, or was truncated");
  Pattern p;
  p.head = w;
  p.block = w[kBlock];
  p.outputs = w[kOutputs];
  p.columns = w[kColumns];
  p.taps = w[kTaps];
  p.groups = w[kGroups];
  p.entries = w[kEntries];
  p.elements = w[kElements];
  p.indptr = w + w[kIndptrAt];
  p.indices = w + w[kIndicesAt];
  p.t_indptr = w + w[kTIndptrAt];
  p.t_indices = w + w[kTIndicesAt];
  p.perm = w + w[kPermAt];
  p.bits = w[kBitsAt] ? reinterpret_cast<const uint16_t*>(w + w[kBitsAt]) : nullptr;
  return p;
}

// A sparse matrix a kernel can run: the weight itself, or its transpose.
template <class T>
struct Matrix {
  const T* values;
  const int32_t* indices;
  const int32_t* indptr;
  int64_t block;       // R
  int64_t block_rows;  // over all groups
  int64_t outputs;     // over all groups
  int64_t columns;     // of one group
  int64_t taps;
  int64_t groups;

  int64_t channels() const { return columns / taps; }  // of one group
  int64_t group_block_rows() const { return block_rows / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  // Nonzeros per column: how often a packed panel is read again.
  double reuse() const { return columns ? static_cast<double>(indptr[block_rows]) * block / groups / columns : 0.0; }
};

}  // namespace dass
