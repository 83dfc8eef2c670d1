// What the checks of the kernels share: memory that notices what is touched beside it, random numbers,
// error bounds, and how a wrong value is reported.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/kernels.h"

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

// Largest relative difference of two sums of `length` products in any order, one in T and one in
// double, times which the sum of the absolute products is to be taken: dass_kernels.testing.tolerance.
template <class T>
double tolerance(int64_t length) {
  double sum = 0;
  for (const double eps : {static_cast<double>(std::numeric_limits<T>::epsilon()), 0x1p-52}) {
    const double n = (static_cast<double>(length) + 2) * eps / 2;
    sum += n / (1 - n);
  }
  return sum;
}

// A value that is expected, and the sum of the absolute values of what it is made of.
struct Sum {
  double value = 0;
  double magnitude = 0;
  void add(double v) {
    value += v;
    magnitude += std::fabs(v);
  }
  double bound(double relative) const { return relative * magnitude; }
};

inline double activated(double v, dass::Activation activation) {
  const auto clamp = [](double u, double high) { return std::isnan(u) ? u : std::fmin(high, std::fmax(0.0, u)); };
  switch (activation) {
    case dass::kRelu:
      return clamp(v, std::numeric_limits<double>::infinity());
    case dass::kRelu6:
      return clamp(v, 6);
    case dass::kHardswish:
      return v * clamp(v + 3, 6) / 6;
    default:
      return v;
  }
}

// dass_kernels.testing.forward_bound: hardswish has a slope of at most 1.5 and rounds four times.
template <class T>
double forward_bound(const Sum& sum, int64_t length, dass::Activation activation) {
  if (activation != dass::kHardswish) return sum.bound(tolerance<T>(length));
  const double bound = 1.5 * sum.bound(tolerance<T>(length));
  return bound + tolerance<T>(2) * (sum.magnitude + bound);
}

// NaN, infinity and what an activation makes of them must be met exactly.
inline void expect(double got, double want, double bound, const char* what, int64_t at) {
  ++count();
  if (!std::isfinite(bound)) bound = 0;
  if (std::fabs(got - want) <= bound || got == want || (std::isnan(got) && std::isnan(want))) return;
  char text[200];
  std::snprintf(text, sizeof(text), "%s at %lld: got %.9g, expected %.9g within %.3g", what, static_cast<long long>(at),
                got, want, bound);
  fail(text);
}

template <class T>
void expect_untouched(T got, const char* what, int64_t at) {
  ++count();
  if (!is_poison(got)) fail(std::string(what) + " at " + std::to_string(at) + " was written");
}

// Rows of a sparse matrix: how many entries each has, and their columns in ascending order.
struct Rows {
  std::vector<int32_t> indptr{0};
  std::vector<int32_t> columns;
};

// Row lengths go through 0, 1, 2, ... so that what is done in groups of four or eight has every rest.
inline Rows random_rows(int64_t rows, int64_t columns, Random& random) {
  Rows m;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t left = row % (columns + 1);
    for (int64_t c = 0; c < columns; ++c)
      if (random.below(columns - c) < left) {
        m.columns.push_back(static_cast<int32_t>(c));
        --left;
      }
    m.indptr.push_back(static_cast<int32_t>(m.columns.size()));
  }
  return m;
}

template <class V>
void copy_to(Guarded<V>& to, const std::vector<V>& from) {
  std::copy(from.begin(), from.end(), to.data());
}

// Every kernel of the family goes through its check; each returns how many kernels that were.
template <class T>
int64_t check_spmm(const dass::Kernels<T>& kernels, const std::string& name);
template <class T>
int64_t check_blocked(const dass::Kernels<T>& kernels, const std::string& name);
template <class T>
int64_t check_sddmm(const dass::Kernels<T>& kernels, const std::string& name);
template <class T>
int64_t check_gemv(const dass::Kernels<T>& kernels, const std::string& name);
template <class T>
int64_t check_transpose(const dass::Kernels<T>& kernels, const std::string& name);

constexpr int kBlocks[dass::kBlockSizes] = {1, 4, 8, 16};
constexpr const char* kAddressNames[dass::kAddresses] = {"pitch", "table", "direct"};

}  // namespace checks
