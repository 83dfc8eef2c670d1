// The scheduler: runs the threads of one block as fibers, blocks one after the other.
//
// A fiber runs until it meets a barrier, a warp operation or its end; which fiber runs next is
// drawn at random, so that code which only works in one order is found out.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace shim {

constexpr int kWarp = 32;
enum class State { kRunnable, kAtBarrier, kInWarp, kDone };

struct Place {
  const char* file = "";
  int line = 0;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  State state = State::kDone;
  Place place;  // where it waits
  unsigned mask = 0;
  const char* operation = "";
};

struct Warp {
  unsigned waiting = 0;            // lanes that have arrived
  uint64_t given[kWarp] = {};      // what each brought
  uint64_t published[kWarp] = {};  // and what all of them may read
};

// A __shared__ array: allocated by the first thread that reaches its declaration.
struct SharedArray {
  const char* file;
  int line;
  std::unique_ptr<char, decltype(&std::free)> bytes;
};

class Block {
 public:
  // Order of fibers and blocks: 0 is ascending; other seeds draw, odd ones thread by thread, even
  // ones with one warp running ahead of the others.
  uint64_t seed = 0;
  int64_t launches = 0;

  void launch(dim3 grid, dim3 block, std::function<void()> body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++launches;
    body_ = std::move(body);
    gridDim = grid;
    blockDim = block;
    count_ = static_cast<int>(block.x * block.y * block.z);
    if (count_ < 1 || count_ > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
    if (grid.y > 65535 || grid.z > 65535 || grid.x > INT32_MAX) throw std::runtime_error("grid too large");
    while (static_cast<int>(threads_.size()) < count_) threads_.push_back(std::make_unique<Thread>());
    random_.seed(seed + static_cast<uint64_t>(launches) * 1000003);
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
    if (seed)
      for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_() % i]);
    for (const uint64_t b : order) {
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      run_block();
    }
  }

  // Gives way to the others until every thread of the block is here.
  void barrier(const char* file, int line) { wait(State::kAtBarrier, {file, line}); }

  // Brings `value` and gives way until every lane of `mask` is in the same operation; then the
  // others' values can be read.
  uint64_t* exchange(const char* operation, unsigned mask, uint64_t value) {
    Thread& t = *threads_[current_];
    const int lane = current_ % kWarp;
    if (!(mask >> lane & 1)) fail(std::string(operation) + ": the caller's lane is not in its mask");
    t.mask = mask;
    t.operation = operation;
    Warp& w = warps_[current_ / kWarp];
    w.given[lane] = value;
    w.waiting |= 1u << lane;
    wait(State::kInWarp, {operation, 0});
    return w.published;
  }

  // Shared memory holds bytes 0xff at first: NaN as a float or a half, -1 as an index.
  template <class Array>
  Array& shared(const char* file, int line) {
    for (SharedArray& s : shared_)
      if (s.line == line && !std::strcmp(s.file, file)) return *reinterpret_cast<Array*>(s.bytes.get());
    void* bytes = nullptr;
    if (posix_memalign(&bytes, 16, sizeof(Array))) throw std::bad_alloc();
    std::memset(bytes, 0xff, sizeof(Array));
    shared_.push_back({file, line, {static_cast<char*>(bytes), &std::free}});
    return *static_cast<Array*>(bytes);
  }

  [[noreturn]] void fail(const std::string& what) {
    error_ = what + where(current_);
    threads_[current_]->fiber.switch_to(main_);
    std::abort();
  }

  int lane() const { return current_ % kWarp; }

  static Block& get() {
    static Block block;
    return block;
  }

 private:
  static void entry() {
    Block& b = get();
    Fiber::arrived(b.main_);
    b.body_();
    b.threads_[b.current_]->state = State::kDone;
    b.threads_[b.current_]->fiber.switch_to(b.main_);
    std::abort();
  }

  void wait(State state, Place place) {
    Thread& t = *threads_[current_];
    t.state = state;
    t.place = place;
    t.fiber.switch_to(main_);
  }

  void run_block() {
    shared_.clear();
    warps_.assign((count_ + kWarp - 1) / kWarp, Warp());
    runnable_.clear();
    for (int i = count_; i-- > 0;) {
      const unsigned u = i;
      threads_[i]->index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
      threads_[i]->state = State::kRunnable;
      threads_[i]->fiber.start(&entry);
      runnable_.push_back(i);
    }
    alive_ = count_;
    at_barrier_ = 0;
    while (alive_) {
      if (runnable_.empty()) throw std::runtime_error(stuck());
      current_ = next();
      Thread& t = *threads_[current_];
      threadIdx = t.index;
      main_.switch_to(t.fiber);
      if (!error_.empty()) throw std::runtime_error(std::exchange(error_, ""));
      if (t.state == State::kDone) --alive_;
      if (t.state == State::kAtBarrier && ++at_barrier_ == count_) release_barrier();
      if (t.state == State::kInWarp) release_warp(current_ / kWarp, t.mask);
    }
  }

  int next() {
    size_t at = runnable_.size() - 1;
    if (seed % 2)
      at = random_() % runnable_.size();
    else if (seed) {
      if (random_() % 64 == 0) ahead_ = random_();
      const int warp = static_cast<int>(ahead_ % warps_.size());
      at = random_() % runnable_.size();
      for (size_t i = 0; i < runnable_.size() && runnable_[at] / kWarp != warp; ++i) at = (at + 1) % runnable_.size();
    }
    const int chosen = runnable_[at];
    runnable_.erase(runnable_.begin() + static_cast<std::ptrdiff_t>(at));
    return chosen;
  }

  void make_runnable(int thread) {
    threads_[thread]->state = State::kRunnable;
    runnable_.push_back(thread);
  }

  void release_barrier() {
    for (int i = 1; i < count_; ++i)
      if (threads_[i]->place.line != threads_[0]->place.line || threads_[i]->place.file != threads_[0]->place.file)
        throw std::runtime_error("divergent barrier: " + describe(0) + ", " + describe(i));
    at_barrier_ = 0;
    for (int i = count_; i-- > 0;) make_runnable(i);
  }

  void release_warp(int warp, unsigned mask) {
    Warp& w = warps_[warp];
    if ((w.waiting & mask) != mask) return;
    const int first = warp * kWarp;
    const Thread& mine = *threads_[current_];
    for (int l = 0; l < kWarp; ++l)
      if (mask >> l & 1) {
        const Thread& t = *threads_[first + l];
        if (t.mask != mask || std::strcmp(t.operation, mine.operation))
          throw std::runtime_error("divergent warp operation: " + describe(current_) + ", " + describe(first + l));
      }
    for (int l = kWarp; l-- > 0;)
      if (mask >> l & 1) {
        w.published[l] = w.given[l];
        make_runnable(first + l);
      }
    w.waiting &= ~mask;
  }

  std::string where(int thread) const {
    const uint3& t = threads_[thread]->index;
    return " (block " + std::to_string(blockIdx.x) + " " + std::to_string(blockIdx.y) + " " +
           std::to_string(blockIdx.z) + ", thread " + std::to_string(t.x) + " " + std::to_string(t.y) + " " +
           std::to_string(t.z) + ")";
  }

  std::string describe(int thread) const {
    const Thread& t = *threads_[thread];
    const std::string place = std::string(t.place.file) + (t.place.line ? ":" + std::to_string(t.place.line) : "");
    const char* states[] = {"runs", "waits at ", "waits in ", "has left the kernel"};
    return std::string("a thread ") + states[static_cast<int>(t.state)] +
           (t.state == State::kAtBarrier || t.state == State::kInWarp ? place : "") + where(thread);
  }

  // Nobody can run: one thread of each kind of waiting, and one that has left.
  std::string stuck() const {
    std::string text = "divergent barrier or warp operation: ";
    bool told[4] = {};
    for (int i = 0; i < count_; ++i) {
      bool& seen = told[static_cast<int>(threads_[i]->state)];
      if (!seen) text += describe(i) + "; ";
      seen = true;
    }
    return text;
  }

  std::mutex mutex_;
  Fiber main_;
  std::function<void()> body_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<SharedArray> shared_;
  std::vector<int> runnable_;
  std::mt19937_64 random_;
  std::string error_;
  uint64_t ahead_ = 0;
  int count_ = 0, current_ = 0, alive_ = 0, at_barrier_ = 0;
};

}  // namespace shim
