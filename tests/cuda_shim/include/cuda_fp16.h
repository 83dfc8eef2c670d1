// IEEE binary16 as CUDA's header has it: a storage type and two conversions.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 0) {  // zero and subnormal numbers, in units of 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// To the nearest, ties to even.
inline __half __float2half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7fff)};   // NaN
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above: infinity
  uint32_t kept = 0, shift = 13;
  if (bits < 0x38800000) {  // below 2^-14: subnormal
    const uint32_t exponent = bits >> 23;
    if (exponent < 102) return {sign};
    shift = 126 - exponent;
    kept = (bits & 0x7fffff) | 0x800000;
  } else {
    kept = bits - 0x38000000;
  }
  const uint32_t half = 1u << (shift - 1), rest = kept & (2 * half - 1);
  kept >>= shift;
  if (rest > half || (rest == half && (kept & 1))) ++kept;
  return {static_cast<uint16_t>(sign | kept)};
}
