// What the dense kernels ask of a register, as functions that can be called from outside: compiled once
// per instruction set, as the kernels are.
#pragma once
#include <cstdint>

namespace checks {

template <class T>
struct RegisterFns {
  int lanes;
  void (*keep)(const T* a, uint32_t mask, T* out);
};

struct Registers {
  RegisterFns<float> f32;
  RegisterFns<double> f64;
  void (*even)(const float* a, const float* b, float* out);
  void (*odd)(const float* a, const float* b, float* out);
  void (*shift_in)(const float* a, float next, float* out);
  void (*larger)(const float* a, const float* b, float* out);
};

// Weak: the addresses of those that are not built for this processor are null.
extern const Registers kRegistersScalar __attribute__((weak));
extern const Registers kRegistersAvx2 __attribute__((weak));
extern const Registers kRegistersAvx512 __attribute__((weak));
extern const Registers kRegistersNeon __attribute__((weak));

}  // namespace checks
