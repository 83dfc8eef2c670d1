// Scratch memory and the division of work over torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace dass {

// A buffer that only grows; one per thread and slot, so a call allocates nothing once warm.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kSlack + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  // Kernels load whole tiles: a tile's last vectors may reach past the last column.
  static constexpr size_t kSlack = 4096;
  void* data_ = nullptr;
  size_t size_ = 0;
};

enum BufferSlot { kPanel, kOutput, kOffsets, kDirectEntries, kValues, kOther, kPartial, kCursors, kBufferSlots };

inline Buffer& buffer(BufferSlot slot) {
  thread_local Buffer buffers[kBufferSlots];
  return buffers[slot];
}

// First of the rows whose work precedes `part` of `parts`. A row costs its nonzeros plus what it
// takes to start and store it, worth about four more.
inline int64_t split_rows(const int32_t* indptr, int64_t begin, int64_t end, int64_t part, int64_t parts) {
  if (part <= 0) return begin;
  if (part >= parts) return end;
  constexpr int64_t kRowCost = 4;
  const int64_t base = indptr[begin];
  const int64_t total = indptr[end] - base + kRowCost * (end - begin);
  const int64_t target = total * part / parts;
  int64_t lo = begin, hi = end;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (indptr[mid] - base + kRowCost * (mid - begin) < target)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

// Calls fn(unit, first, last, parts) so that parts [0, parts) of every unit are done once, with as
// many row parts as there are threads. A thread gets a contiguous run, so it mostly sees whole
// units. Results do not depend on the division: an output is one row's sum in the same order.
template <class Fn>
void for_units(int64_t units, const Fn& fn) {
  const int64_t parts = std::max<int64_t>(1, torch::stable::get_num_threads());
  if (parts == 1 || units == 0) {
    for (int64_t u = 0; u < units; ++u) fn(u, 0, 1, 1);
    return;
  }
  torch::stable::parallel_for(0, units * parts, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi;) {
      const int64_t unit = i / parts;
      const int64_t end = std::min(hi, (unit + 1) * parts);
      fn(unit, i - unit * parts, end - unit * parts, parts);
      i = end;
    }
  });
}

// Calls fn(lo, hi) on ranges that cover [0, channels), in parallel where that is worth it.
template <class Fn>
void for_channels(int64_t channels, const Fn& fn) {
  if (torch::stable::get_num_threads() == 1 || channels < 2)
    fn(int64_t{0}, channels);
  else
    torch::stable::parallel_for(0, channels, 1, fn);
}

// Calls fn(group). Many groups are divided between the threads, and what fn does in parallel is then
// done by one; a few are shared by all threads, one after the other.
template <class Fn>
void for_groups(int64_t groups, const Fn& fn) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || groups < 2 * threads) {
    for (int64_t g = 0; g < groups; ++g) fn(g);
    return;
  }
  torch::stable::parallel_for(0, groups, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t g = lo; g < hi; ++g) fn(g);
  });
}

}  // namespace dass
