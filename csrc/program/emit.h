// Machine code for one set of sparse rows: no index is loaded, no loop ends at an unforeseen place.
#pragma once
#include <cstdint>
#include <memory>

#include "rows.h"

namespace dass {

// `height` outputs x `vectors` vectors of pixels are summed in registers at a time.
struct EmitTile {
  int height;
  int vectors;
};

class EmittedRows {
 public:
  virtual ~EmittedRows() = default;
  // Row tiles [first, last) over `count` blocks, which hold tile().vectors vectors each.
  virtual void run(int64_t first, int64_t last, const float* x, float* y, const float* residual, const Block* blocks,
                   int64_t count) const = 0;
  virtual int64_t tiles() const = 0;
  virtual int64_t code_bytes() const = 0;
};

// Why no code can be emitted here: a build without Xbyak, a processor without AVX-512, memory that may
// not be made executable, DASS_EMIT=0. Null if it can.
const char* emit_unavailable();

// Null if emitting is not possible for these rows.
std::unique_ptr<EmittedRows> emit_rows(const SparseRows& rows, EmitTile tile);

}  // namespace dass
