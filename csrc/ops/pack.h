// Copies input planes into panels: padding made explicit, strides split into phases.
#pragma once
#include <cstring>

#include "../cpu/kernels.h"
#include "shape.h"

namespace dass {

// Row `y` of phase (a, b) of the padded, zero-stuffed input: which input row it is, or -1 for zeros.
inline int64_t input_row(const Shape& s, int64_t padded_row) {
  const int64_t iy = padded_row - s.pt;
  if (iy < 0 || iy % s.uh) return -1;
  return iy / s.uh < s.h ? iy / s.uh : -1;
}

// Calls fn(j, ix) for every column j < p.stride of phase b that holds input column ix; the others are
// zeros. Either the input is strided or it has zeros put in, never both.
template <class Fn>
void for_columns(const Shape& s, const Plane& p, int64_t b, const Fn& fn) {
  if (s.uw == 1) {
    const int64_t first = std::max<int64_t>(0, ceil_div(s.pl - b, s.sw));
    const int64_t last = std::min(p.stride, ceil_div(s.w + s.pl - b, s.sw));
    for (int64_t j = first, ix = first * s.sw + b - s.pl; j < last; ++j, ix += s.sw) fn(j, ix);
  } else {
    const int64_t first = std::max<int64_t>(0, ceil_div(-s.pl, s.uw));
    for (int64_t ix = first, j = first * s.uw + s.pl; ix < s.w && j < p.stride; ++ix, j += s.uw) fn(j, ix);
  }
}

// One row of one phase: dst[j] = padded[j * sw + b], j < p.stride.
template <class T>
void pack_row(const Shape& s, const Plane& p, int64_t b, const T* src, T* dst) {
  if (s.sw == 1 && s.uw == 1) {
    const int64_t left = std::min(std::max<int64_t>(s.pl, 0), p.stride);
    const int64_t skip = std::max<int64_t>(-s.pl, 0);
    const int64_t count = std::max<int64_t>(0, std::min(p.stride - left, s.w - skip));
    for (int64_t j = 0; j < left; ++j) dst[j] = T(0);
    std::memcpy(dst + left, src + skip, count * sizeof(T));
    for (int64_t j = left + count; j < p.stride; ++j) dst[j] = T(0);
    return;
  }
  std::memset(dst, 0, p.stride * sizeof(T));
  for_columns(s, p, b, [&](int64_t j, int64_t ix) { dst[j] = src[ix]; });
}

// Channels [0, channels) of one image, output rows [oy0, oy0 + p.rows).
template <class T>
void pack_planes(const Shape& s, const Plane& p, int64_t channels, int64_t oy0, const T* x, T* panel) {
  for (int64_t c = 0; c < channels; ++c) {
    const T* plane = x + c * s.h * s.w;
    T* base = panel + c * p.channel;
    for (const auto& [a, b] : p.phases) {
      for (int64_t y = 0; y < p.in_rows; ++y, base += p.stride) {
        const int64_t row = input_row(s, (oy0 + y) * s.sh + a);
        if (row < 0)
          std::memset(base, 0, p.stride * sizeof(T));
        else
          pack_row(s, p, b, plane + row * s.w, base);
      }
    }
    std::memset(base, 0, (panel + (c + 1) * p.channel - base) * sizeof(T));
  }
}

// The same with `lanes` images side by side in the innermost place; `row` holds one transposed row.
template <class T>
void pack_lanes(const Kernels<T>& k, const Shape& s, const Plane& p, int64_t channels, int64_t oy0, const T* x,
                T* panel, T* row) {
  const int64_t lanes = k.lanes, image = s.c * s.h * s.w;
  for (int64_t c = 0; c < channels; ++c) {
    T* base = panel + c * p.channel * lanes;
    for (const auto& [a, b] : p.phases) {
      for (int64_t y = 0; y < p.in_rows; ++y, base += p.stride * lanes) {
        const int64_t iy = input_row(s, (oy0 + y) * s.sh + a);
        if (iy < 0) {
          std::memset(base, 0, p.stride * lanes * sizeof(T));
          continue;
        }
        const T* src = x + (c * s.h + iy) * s.w;
        if (s.sw == 1 && s.uw == 1 && s.pl >= 0) {
          const int64_t count = std::max<int64_t>(0, std::min(p.stride - s.pl, s.w));
          std::memset(base, 0, s.pl * lanes * sizeof(T));
          k.transpose(src, image, base + s.pl * lanes, lanes, lanes, count);
          std::memset(base + (s.pl + count) * lanes, 0, (p.stride - s.pl - count) * lanes * sizeof(T));
          continue;
        }
        k.transpose(src, image, row, lanes, lanes, s.w);
        std::memset(base, 0, p.stride * lanes * sizeof(T));
        for_columns(s, p, b,
                    [&](int64_t j, int64_t ix) { std::memcpy(base + j * lanes, row + ix * lanes, lanes * sizeof(T)); });
      }
    }
  }
}

// Copies pixels [q0, q0 + count) of `channels` planes into rows of `width`, zeros behind them. Pixels
// are numbered through the images of the batch.
template <class T>
void gather_pixels(const T* src, int64_t image, int64_t pixels, int64_t channels, int64_t q0, int64_t count,
                   int64_t width, T* dst) {
  for (int64_t q = q0; q < q0 + count;) {
    const int64_t n = q / pixels, p = q % pixels, run = std::min(pixels - p, q0 + count - q);
    for (int64_t c = 0; c < channels; ++c)
      std::memcpy(dst + c * width + (q - q0), src + n * image + c * pixels + p, run * sizeof(T));
    q += run;
  }
  if (count < width)
    for (int64_t c = 0; c < channels; ++c) std::memset(dst + c * width + count, 0, (width - count) * sizeof(T));
}

// The way back for one plane: pixels [q0, q0 + count) from src into the images of the batch.
template <class T>
void scatter_pixels(const T* src, int64_t image, int64_t pixels, int64_t q0, int64_t count, T* dst) {
  for (int64_t q = q0; q < q0 + count;) {
    const int64_t n = q / pixels, p = q % pixels, run = std::min(pixels - p, q0 + count - q);
    std::memcpy(dst + n * image + p, src + (q - q0), run * sizeof(T));
    q += run;
  }
}

}  // namespace dass
