#include "program.h"

#include <chrono>
#include <cstdlib>
#include <new>
#include <thread>

namespace dass {

// Steps load whole registers: some floats before and behind what they mean.
constexpr int64_t kSlack = 4096;

namespace {

// Floats on a page of their own, zeros at first, with slack on both sides.
class Memory {
 public:
  explicit Memory(int64_t floats) : floats_(floats) {
    constexpr size_t kPage = 4096;
    const size_t bytes = ((floats + 2 * kSlack) * sizeof(float) + kPage - 1) / kPage * kPage;
    memory_ = static_cast<float*>(std::aligned_alloc(kPage, bytes));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_, 0, bytes);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(memory_); }
  float* data() const { return memory_ + kSlack; }
  int64_t floats() const { return floats_; }

 private:
  int64_t floats_;
  float* memory_;
};

}  // namespace

class Program::Arena : public Memory {
 public:
  using Memory::Memory;
};

float* scratch_floats(ScratchSlot slot, int64_t floats) {
  thread_local std::unique_ptr<Memory> memory[kScratchSlots];
  auto& m = memory[slot];
  if (!m || m->floats() < floats) m = std::make_unique<Memory>(floats);
  return m->data();
}

// Each thread does its own part of a step and waits for the others'. Nothing depends on how many threads
// really run: whoever has waited long for a part that nobody has begun does it.
//
// A line of memory that one core writes and another reads may take half a microsecond between them, so
// the lines are few: a part's `claimed` is hardly touched by others, and `done` is written once per step.
struct Program::Shared {
  struct Line {
    alignas(64) std::atomic<int64_t> steps{0};
  };
  explicit Shared(int64_t parts) : claimed(parts), done(parts) {}
  // The right to do part `part` of step `step`, to one who asks.
  bool claim(int64_t part, int64_t step) {
    int64_t next = step;
    return claimed[part].steps.compare_exchange_strong(next, step + 1, std::memory_order_acq_rel);
  }
  std::vector<Line> claimed, done;
};

Program::Program(int64_t images, int64_t arena, std::vector<int64_t> apart, std::vector<StepPtr> steps)
    : images_(images), arena_(arena), apart_(std::move(apart)), steps_(std::move(steps)) {}

Program::~Program() = default;

std::unique_ptr<Program::Arena> Program::take() const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      auto arena = std::move(free_.back());
      free_.pop_back();
      return arena;
    }
  }
  return std::make_unique<Arena>(arena_);
}

void Program::give(std::unique_ptr<Arena> arena) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(arena));
}

Pass Program::pass(float* arena, const std::vector<float*>& tensors, int64_t batch, int64_t turn) const {
  Pass p{arena, tensors, apart_, std::min(images_, batch - turn * images_)};
  for (size_t i = 0; i < tensors.size(); ++i) p.tensors[i] += turn * images_ * apart_[i];
  return p;
}

void Program::alone(const Pass& pass, std::vector<double>* times) const {
  using Clock = std::chrono::steady_clock;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const auto begin = times ? Clock::now() : Clock::time_point();
    steps_[i]->run(pass, 0, 1);
    if (times) (*times)[i] += std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
  }
}

void Program::together(const Pass& pass, int64_t threads, const ParallelFor& parallel) const {
  constexpr int64_t kPatience = 1 << 13, kAbsent = 1 << 6;  // looks at a part that nobody has begun
  Shared shared(threads);
  const auto work = [&](int64_t step, int64_t part) {
    if (!shared.claim(part, step)) return false;
    steps_[step]->run(pass, part, threads);
    shared.done[part].steps.store(step + 1, std::memory_order_release);
    return true;
  };
  parallel(threads, [&](int64_t own, int64_t end) {
    std::vector<int64_t> patience(threads, kPatience);
    for (int64_t step = 0; step < static_cast<int64_t>(steps_.size()); ++step) {
      for (int64_t part = own; part < end; ++part) work(step, part);
      for (int64_t part = 0; part < threads; ++part)
        for (int64_t looks = 1; shared.done[part].steps.load(std::memory_order_acquire) <= step; ++looks) {
          if (looks % patience[part]) continue;
          if (work(step, part))
            patience[part] = kAbsent;
          else
            std::this_thread::yield();
        }
    }
  });
}

void Program::run(const std::vector<float*>& tensors, int64_t batch, int64_t threads, const ParallelFor& parallel,
                  std::vector<double>* times) const {
  const int64_t turns = (batch + images_ - 1) / images_;
  if (threads > 1 && turns >= threads && !times) {
    parallel(turns, [&](int64_t lo, int64_t hi) {
      auto arena = take();
      for (int64_t turn = lo; turn < hi; ++turn) alone(pass(arena->data(), tensors, batch, turn), nullptr);
      give(std::move(arena));
    });
    return;
  }
  auto arena = take();
  for (int64_t turn = 0; turn < turns; ++turn) {
    const Pass p = pass(arena->data(), tensors, batch, turn);
    if (threads > 1 && !times)
      together(p, threads, parallel);
    else
      alone(p, times);
  }
  give(std::move(arena));
}

std::vector<std::string> Program::kernels() const {
  std::vector<std::string> names;
  for (const auto& step : steps_) names.push_back(step->kernel());
  return names;
}

}  // namespace dass
