// Runs steps in order, over a batch, on one or more threads.
#pragma once
#include <atomic>
#include <functional>
#include <mutex>

#include "step.h"

namespace dass {

// Calls its argument for ranges that cover [0, count), on different threads where there are any.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>&)>;

class Program {
 public:
  // images: per pass. arena: floats. apart: for each tensor of a call the floats from image to image.
  Program(int64_t images, int64_t arena, std::vector<int64_t> apart, std::vector<StepPtr> steps);
  ~Program();

  // tensors: inputs, then outputs, contiguous float32 [batch, ...]. May be called by several threads at
  // a time. times: null, or nanoseconds to add to, one for each step, of a run on one thread.
  void run(const std::vector<float*>& tensors, int64_t batch, int64_t threads, const ParallelFor& parallel,
           std::vector<double>* times = nullptr) const;

  const std::vector<int64_t>& apart() const { return apart_; }
  std::vector<std::string> kernels() const;
  int64_t arena_bytes() const { return arena_ * static_cast<int64_t>(sizeof(float)); }

 private:
  class Arena;
  struct Shared;
  std::unique_ptr<Arena> take() const;
  void give(std::unique_ptr<Arena> arena) const;
  Pass pass(float* arena, const std::vector<float*>& tensors, int64_t batch, int64_t turn) const;
  void alone(const Pass& pass, std::vector<double>* times) const;
  void together(const Pass& pass, int64_t threads, const ParallelFor& parallel) const;

  int64_t images_;
  int64_t arena_;
  std::vector<int64_t> apart_;
  std::vector<StepPtr> steps_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Arena>> free_;
};

}  // namespace dass
