// The geometry of a convolution and of the padded planes ("panels") its kernels read.
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dass {

// The int[] argument of the conv ops, in this order.
enum SpecWord : int {
  kSpecOutputs,
  kSpecKh,
  kSpecKw,
  kSpecStrideH,
  kSpecStrideW,
  kSpecPadTop,
  kSpecPadBottom,
  kSpecPadLeft,
  kSpecPadRight,
  kSpecDilationH,
  kSpecDilationW,
  kSpecActivation,
  kSpecWords,
};

struct Shape {
  int64_t n, c, h, w;  // input, c over all groups
  int64_t o, oh, ow;   // output
  int64_t kh, kw, sh, sw, pt, pl, dh, dw;
  // The input is read as if uh - 1 zero rows and uw - 1 zero columns stood between its own (the
  // gradient of a strided convolution).
  int64_t uh = 1, uw = 1;

  bool pointwise() const {
    return kh == 1 && kw == 1 && sh == 1 && sw == 1 && pt == 0 && pl == 0 && uh == 1 && uw == 1 && oh == h && ow == w;
  }
};

// How one channel's rows [oy0, oy0 + rows) of the output are laid out in a panel. With stride the
// plane is split into sh x sw phases, so that neighbouring outputs read neighbouring inputs:
// output (y, x), tap (ky, kx) reads phase (ky dh % sh, kx dw % sw) at (y + ky dh / sh, x + kx dw / sw).
struct Plane {
  int64_t rows;                             // output rows
  int64_t in_rows;                          // rows of a phase
  int64_t stride;                           // elements from a row to the next
  int64_t phase;                            // elements of one phase
  int64_t channel;                          // elements of one channel: pitch between channels
  std::vector<std::pair<int, int>> phases;  // those that some tap reads
};

// Rounds up, for any a and b > 0.
inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a - 1) / b + 1 : -(-a / b); }

// `shared`: the zeros right of a row serve as those left of the next (flat tiles run across rows).
// `align`: lanes of the flat tiles, whose last vectors read past the last row, or 1. `bytes`: size of an
// element, all lanes.
inline Plane make_plane(const Shape& s, int64_t rows, bool shared, int64_t align, int64_t bytes) {
  Plane p;
  p.rows = rows;
  const int64_t reach_h = (s.kh - 1) * s.dh, reach_w = (s.kw - 1) * s.dw;
  p.in_rows = rows + reach_h / s.sh;
  const int64_t width = (s.ow - 1) * s.sw + reach_w + 1;  // padded input columns that are read
  const int64_t in_w = (s.w - 1) * s.uw + 1;
  p.stride = ceil_div(width, s.sw);
  if (shared && s.sw == 1 && s.pl >= 0) {
    const int64_t right = width - s.pl - in_w;
    if (right >= 0 && right <= s.pl && right <= reach_w) p.stride = s.pl + in_w;
  }
  for (int ky = 0; ky < s.kh; ++ky)
    for (int kx = 0; kx < s.kw; ++kx) {
      const std::pair<int, int> ph(ky * s.dh % s.sh, kx * s.dw % s.sw);
      if (std::find(p.phases.begin(), p.phases.end(), ph) == p.phases.end()) p.phases.push_back(ph);
    }
  p.phase = p.in_rows * p.stride;
  const int64_t flat = ceil_div((rows - 1) * p.stride + s.ow, align) * align;
  const int64_t reach = reach_h / s.sh * p.stride + reach_w / s.sw;
  const int64_t others = p.phase * (static_cast<int64_t>(p.phases.size()) - 1);
  p.channel = ceil_div(others + std::max(p.phase, flat + reach), align) * align;
  // Planes a multiple of 4 KiB apart would compete for the same cache sets.
  if (p.channel * bytes % 4096 == 0) p.channel += align;
  return p;
}

// Element offset of every column (channel * taps + tap) from a panel's start, times `lanes`.
inline void fill_offsets(const Shape& s, const Plane& p, int64_t channels, int64_t lanes, int32_t* out) {
  std::vector<int32_t> tap(static_cast<size_t>(s.kh * s.kw));
  for (int64_t ky = 0; ky < s.kh; ++ky)
    for (int64_t kx = 0; kx < s.kw; ++kx) {
      const std::pair<int, int> ph(static_cast<int>(ky * s.dh % s.sh), static_cast<int>(kx * s.dw % s.sw));
      const int64_t index = std::find(p.phases.begin(), p.phases.end(), ph) - p.phases.begin();
      tap[ky * s.kw + kx] =
          static_cast<int32_t>((index * p.phase + ky * s.dh / s.sh * p.stride + kx * s.dw / s.sw) * lanes);
    }
  const int64_t taps = s.kh * s.kw;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t) out[c * taps + t] = static_cast<int32_t>(c * p.channel * lanes) + tap[t];
}

}  // namespace dass
