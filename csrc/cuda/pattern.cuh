// The pattern tensor as a kernel reads it.
#pragma once
#include "../ops/pattern_words.h"
#include "kernels.h"
#include "launch.cuh"

namespace dass::cuda {

// The rows of the weight, or of its transpose: compressed rows whose column numbers rise.
struct Rows {
  const int32_t* indptr;   // [ceil(rows / block) + 1]
  const int32_t* indices;  // channel in the group * taps + tap
  const int32_t* perm;     // place in values, or null: entry * block + row % block
  int rows;                // over all groups
  int group_rows;
  int columns;  // of one group
  int taps;
  int groups;
  int block;

  __device__ int begin(int row) const { return indptr[row / block]; }
  __device__ int end(int row) const { return indptr[row / block + 1]; }
  __device__ int64_t place(int entry, int row) const {
    return perm ? perm[entry] : static_cast<int64_t>(entry) * block + row % block;
  }
};

// The header lies in device memory, where the host cannot look without waiting: a pattern that does
// not fit the other arguments ends the kernel here, before it could read astray.
__device__ inline Rows read_rows(const PatternTensor& t, const Window& w, bool transposed) {
  const int32_t* head = t.words;
  const int outputs = transposed ? w.c : w.o, channels = transposed ? w.o : w.c;
  const bool fits = t.length >= kHeaderWords && head[kMagic] == kPatternMagic && head[kLength] == t.length &&
                    head[kOutputs] == outputs && head[kTaps] == w.kh * w.kw && head[kGroups] > 0 &&
                    head[kColumns] / head[kTaps] * head[kGroups] == channels &&
                    static_cast<int64_t>(head[kEntries]) * head[kBlock] == t.value_count;
  if (!fits) __trap();
  Rows r;
  r.taps = head[kTaps];
  r.groups = head[kGroups];
  r.rows = transposed ? channels : outputs;
  r.group_rows = r.rows / r.groups;
  r.columns = transposed ? outputs / r.groups * r.taps : head[kColumns];
  r.block = transposed ? 1 : head[kBlock];
  r.indptr = head + head[transposed ? kTIndptrAt : kIndptrAt];
  r.indices = head + head[transposed ? kTIndicesAt : kIndicesAt];
  r.perm = transposed ? head + head[kPermAt] : nullptr;
  return r;
}

}  // namespace dass::cuda
