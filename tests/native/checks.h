// What the checks of the kernels share: error bounds, expected sums, sparse rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "cpu/dense.h"
#include "cpu/kernels.h"
#include "guarded.h"

namespace checks {

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

// A value that is expected, the sum of the absolute values of what it is made of, and how many products
// that are.
struct Sum {
  double value = 0;
  double magnitude = 0;
  int64_t length = 0;
  void add(double v) {
    value += v;
    magnitude += std::fabs(v);
  }
  void add(double a, double b) {
    add(a * b);
    ++length;
  }
  template <class T>
  double bound() const {
    return tolerance<T>(length) * magnitude;
  }
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
    case dass::kHardsigmoid:
      return clamp(v + 3, 6) / 6;
    case dass::kSigmoid:
      return 1 / (1 + std::exp(-v));
    case dass::kSilu:
      return v / (1 + std::exp(-v));
    default:
      return v;
  }
}

// dass_kernels.testing.forward_bound: hardswish has a slope of at most 1.5 and rounds four times; what
// has an exponential rounds more often, and is at most its argument or 1.
template <class T>
double forward_bound(const Sum& sum, dass::Activation activation) {
  if (activation < dass::kHardswish) return sum.bound<T>();
  const double bound = 1.5 * sum.bound<T>();
  if (activation == dass::kHardswish) return bound + tolerance<T>(2) * (sum.magnitude + bound);
  return bound + tolerance<T>(6) * (sum.magnitude + bound + 1);
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
// Those of compiled networks, and what they take of a register.
int64_t check_dense(const dass::KernelTable& table);
void check_registers(const std::string& isa);
// A whole network as a program, on the instruction set in use.
void check_program(const std::string& isa);
// The ops, on the instruction set in use; returns how many cases that were.
template <class T>
int64_t check_convolutions(const std::string& name);
template <class T>
int64_t check_linears(const std::string& name);

constexpr int kBlocks[dass::kBlockSizes] = {1, 4, 8, 16};
constexpr const char* kAddressNames[dass::kAddresses] = {"pitch", "table", "direct"};

}  // namespace checks
