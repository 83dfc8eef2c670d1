// Activations of one register.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace dass {
namespace DASS_ISA_NAME {

// Forced inline, so that a constant activation leaves no test behind.
template <class T>
DASS_INLINE Vec<T> activate(Vec<T> v, Activation activation) {
  const Vec<T> zero = Vec<T>::zero();
  const Vec<T> six = Vec<T>::set1(T(6));
  switch (activation) {
    case kRelu:
      return vmax(zero, v);
    case kRelu6:
      return vmin(six, vmax(zero, v));
    case kHardswish:  // x * clamp(x + 3, 0, 6) / 6
      return v * vmin(six, vmax(zero, v + Vec<T>::set1(T(3)))) * Vec<T>::set1(T(1) / T(6));
    default:
      return v;
  }
}

// The same with those that need an exponential, element by element.
DASS_INLINE Vec<float> activate_any(Vec<float> v, Activation activation) {
  if (activation <= kHardswish) return activate(v, activation);
  if (activation == kHardsigmoid)
    return vmin(Vec<float>::set1(6.0f), vmax(Vec<float>::zero(), v + Vec<float>::set1(3.0f))) *
           Vec<float>::set1(1.0f / 6.0f);
  float x[Vec<float>::lanes];
  v.store(x);
  for (int i = 0; i < Vec<float>::lanes; ++i) {
    const float s = 1.0f / (1.0f + __builtin_expf(-x[i]));
    x[i] = activation == kSilu ? x[i] * s : s;
  }
  return Vec<float>::load(x);
}

}  // namespace DASS_ISA_NAME
}  // namespace dass
