// Where a check is, how it fails, random numbers, and memory that notices what is touched beside it.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

namespace checks {

// The kernel and the case that run now, for the message of a failure or a crash.
inline std::string& current() {
  static std::string name;
  return name;
}

inline int64_t& count() {
  static int64_t values = 0;
  return values;
}

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("wrong: %s: %s\n", current().c_str(), what.c_str());
  std::exit(1);
}

// An xorshift generator: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 11;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  // In [-1, 1), never 0.
  template <class T>
  T number() {
    return static_cast<T>((static_cast<double>(bits() % 65536) + 0.5) / 32768 - 1);
  }

 private:
  uint64_t state_;
};

template <class T>
T poison() {
  return std::numeric_limits<T>::quiet_NaN();
}
template <>
inline int32_t poison<int32_t>() {
  return -1;
}

template <class T>
bool is_poison(T v) {
  const T p = poison<T>();
  return std::memcmp(&v, &p, sizeof(T)) == 0;
}

// `size` poisoned elements that end where a page without access begins, with a band of poison before
// them: a read or a write past the end crashes, a write before the beginning is found by check().
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t size) : size_(size) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = (size + kBand) * static_cast<int64_t>(sizeof(T));
    length_ = (bytes + page - 1) / page * page + page;
    void* p = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) fail("mmap");
    base_ = static_cast<char*>(p);
    if (mprotect(base_ + length_ - page, page, PROT_NONE)) fail("mprotect");
    data_ = reinterpret_cast<T*>(base_ + length_ - page) - size;
    for (int64_t i = -kBand; i < size; ++i) data_[i] = poison<T>();
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, length_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  void fill(Random& random) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = random.number<T>();
  }
  void check(const char* name) const {
    for (int64_t i = -kBand; i < 0; ++i)
      if (!is_poison(data_[i])) fail(std::string("wrote before ") + name + ", at " + std::to_string(i));
  }

 private:
  static constexpr int64_t kBand = 64;
  int64_t size_;
  int64_t length_;
  char* base_;
  T* data_;
};

}  // namespace checks
