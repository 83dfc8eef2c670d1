// A depthwise convolution of some rows of planes, by emitted code or by the kernels of the table.
#pragma once
#include <map>

#include "emit.h"
#include "step.h"

namespace dass {

class DepthwiseRunner {
 public:
  // emitted: whether code may be made.
  DepthwiseRunner(const DepthwiseSpec& spec, bool emitted);

  // Before runs of as many rows.
  void prepare(int64_t rows);
  bool prepared(int64_t rows) const { return emitted_.count(rows) > 0; }
  // x: the first tap of the first output of channel `first`. y: that output. zeros: floats behind a row.
  void run(const float* x, float* y, int64_t first, int64_t last, int64_t rows, int64_t zeros) const;
  std::string name() const;

 private:
  DepthwiseSpec s_;
  bool wanted_;
  void (*fn_)(const DepthwiseArgs&);
  int64_t zeros_;
  std::vector<float> packed_;  // [channels][kernel * kernel + 1], the bias last
  std::vector<int32_t> offsets_;
  std::map<int64_t, std::unique_ptr<EmittedWindow>> emitted_;
};

}  // namespace dass
