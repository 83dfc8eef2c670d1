// The weight gradient of a sparse convolution on its mask.
#pragma once
#include "conv_forward.h"

namespace dass {

// Panels are shared by all threads: packed in parallel over channels, read in parallel over rows.
template <class T>
void run_rows(const Matrix<T>& m, int64_t group, SddmmTile<T> t, SddmmFn<T> const* kernels, int64_t vectors,
              int64_t step, int64_t vector_elems) {
  for_units(1, [&](int64_t, int64_t first, int64_t last, int64_t parts) {
    SddmmTile<T> part = t;
    const int64_t per = m.group_block_rows();
    part.row_begin = split_rows(m.indptr, group * per, (group + 1) * per, first, parts);
    part.row_end = split_rows(m.indptr, group * per, (group + 1) * per, last, parts);
    for (int64_t v = 0; v < vectors; v += step) {
      part.x = t.x + v * vector_elems;
      part.dy = t.dy + v * vector_elems;
      kernels[std::min(step, vectors - v) - 1](part);
    }
  });
}

template <class T>
SddmmTile<T> make_sddmm(const Matrix<T>& m, const int32_t* indices, const int32_t* offsets, T* dvalues) {
  SddmmTile<T> t{};
  t.offsets = offsets;
  t.indices = indices;
  t.indptr = m.indptr;
  t.outputs = m.outputs;
  t.block = m.block;
  t.dvalues = dvalues;
  return t;
}

template <class T>
void sddmm_planes(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, const T* dy, T* dvalues) {
  const int64_t lanes = k.lanes, cg = m.channels(), og = m.group_outputs();
  const int64_t rows = panel_rows(s, cg, 1, sizeof(T), kPlaneBudget);
  const Plane p = make_plane(s, rows, true, lanes, sizeof(T));
  const Entries a = find_entries(m, s, p, 1, s.n * ceil_div(s.oh * s.ow, lanes));
  const int64_t full = ceil_div((rows - 1) * p.stride + s.ow, lanes) * lanes;
  for_groups(m.groups, [&](int64_t g) {
    SddmmTile<T> t = make_sddmm(m, a.indices, a.offsets, dvalues);
    T* panel = buffer(kPanel).get<T>(cg * p.channel);
    T* grads = buffer(kOutput).get<T>(og * full);
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t oy0 = 0; oy0 < s.oh; oy0 += rows) {
        const int64_t count = std::min(rows, s.oh - oy0);
        const T* src = x + (n * s.c + g * cg) * s.h * s.w;
        for_channels(cg, [&](int64_t lo, int64_t hi) {
          pack_planes(s, p, hi - lo, oy0, src + lo * s.h * s.w, panel + lo * p.channel);
        });
        // Zeros between the rows keep what a flat tile reads there out of the sums.
        const T* gsrc = dy + ((n * s.o + g * og) * s.oh + oy0) * s.ow;
        for_channels(og, [&](int64_t lo, int64_t hi) {
          std::memset(grads + lo * full, 0, (hi - lo) * full * sizeof(T));
          for (int64_t o = lo; o < hi; ++o)
            for (int64_t r = 0; r < count; ++r)
              std::memcpy(grads + o * full + r * p.stride, gsrc + (o * s.oh + r) * s.ow, s.ow * sizeof(T));
        });
        t.x = panel;
        t.lddy = full;
        t.dy = grads - g * og * full;
        const int64_t vectors = ceil_div((count - 1) * p.stride + s.ow, lanes);
        run_rows(m, g, t, k.sddmm[a.kind], vectors, tile_vectors(vectors, k.max_sddmm), lanes);
      }
  });
}

template <class T>
void sddmm_lanes(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, const T* dy, T* dvalues) {
  const int64_t lanes = k.lanes, cg = m.channels(), og = m.group_outputs();
  const int64_t rows = panel_rows(s, cg, lanes, sizeof(T), kLanesBudget);
  const Plane p = make_plane(s, rows, false, 1, sizeof(T) * lanes);
  const Entries a = find_entries(m, s, p, lanes, s.n / lanes * s.oh * s.ow);
  const int64_t step = tile_vectors(s.ow, k.max_sddmm);
  for_groups(m.groups, [&](int64_t g) {
    SddmmTile<T> t = make_sddmm(m, a.indices, a.offsets, dvalues);
    T* panel = buffer(kPanel).get<T>(cg * p.channel * lanes);
    t.lddy = rows * s.ow * lanes;
    T* grads = buffer(kOutput).get<T>(og * t.lddy);
    for (int64_t n = 0; n < s.n; n += lanes)
      for (int64_t oy0 = 0; oy0 < s.oh; oy0 += rows) {
        const int64_t count = std::min(rows, s.oh - oy0);
        const T* src = x + (n * s.c + g * cg) * s.h * s.w;
        for_channels(cg, [&](int64_t lo, int64_t hi) {
          pack_lanes(k, s, p, hi - lo, oy0, src + lo * s.h * s.w, panel + lo * p.channel * lanes,
                     buffer(kOther).get<T>(s.w * lanes));
        });
        const T* gsrc = dy + ((n * s.o + g * og) * s.oh + oy0) * s.ow;
        for_channels(og, [&](int64_t lo, int64_t hi) {
          for (int64_t o = lo; o < hi; ++o)
            k.transpose(gsrc + o * s.oh * s.ow, s.o * s.oh * s.ow, grads + o * t.lddy, lanes, lanes, count * s.ow);
        });
        for (int64_t r = 0; r < count; ++r) {
          t.x = panel + r * p.stride * lanes;
          t.dy = grads - g * og * t.lddy + r * s.ow * lanes;
          run_rows(m, g, t, k.sddmm[a.kind], s.ow, step, lanes);
        }
      }
  });
}

// 1x1: tiles of pixels run on from image to image, read in place where a tile lies within one.
template <class T>
void sddmm_pointwise(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, const T* dy, T* dvalues) {
  const int64_t lanes = k.lanes, cg = m.channels(), og = m.group_outputs(), pixels = s.h * s.w;
  const int64_t total = s.n * pixels, vectors = tile_vectors(ceil_div(total, lanes), k.max_sddmm);
  const int64_t width = vectors * lanes;
  for_groups(m.groups, [&](int64_t g) {
    SddmmTile<T> t = make_sddmm<T>(m, m.indices, nullptr, dvalues);
    T* panel = buffer(kPanel).get<T>(cg * width);
    T* grads = buffer(kOutput).get<T>(og * width);
    for (int64_t q0 = 0; q0 < total; q0 += width) {
      const int64_t count = std::min(width, total - q0), n = q0 / pixels, p = q0 % pixels;
      const T* xs = x + g * cg * pixels;
      const T* gs = dy + g * og * pixels;
      if (count == width && p + count <= pixels) {
        t.x = xs + n * s.c * pixels + p;
        t.dy = gs + n * s.o * pixels + p - g * og * pixels;
        t.pitch = t.lddy = pixels;
      } else {
        for_channels(cg, [&](int64_t lo, int64_t hi) {
          gather_pixels(xs + lo * pixels, s.c * pixels, pixels, hi - lo, q0, count, width, panel + lo * width);
        });
        for_channels(og, [&](int64_t lo, int64_t hi) {
          gather_pixels(gs + lo * pixels, s.o * pixels, pixels, hi - lo, q0, count, width, grads + lo * width);
        });
        t.x = panel;
        t.dy = grads - g * og * width;
        t.pitch = t.lddy = width;
      }
      run_rows(m, g, t, k.sddmm[kPitch], ceil_div(count, lanes), k.max_sddmm, lanes);
    }
  });
}

template <class T>
void run_sddmm(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, const T* dy, T* dvalues) {
  if (s.n == 0 || s.o == 0 || s.oh == 0 || s.ow == 0) return;
  if (s.pointwise()) return sddmm_pointwise(k, m, s, x, dy, dvalues);
  const int64_t batched = s.n / k.lanes * k.lanes;
  Shape part = s;
  if (batched) {
    part.n = batched;
    sddmm_lanes(k, m, part, x, dy, dvalues);
  }
  if (batched == s.n) return;
  part.n = s.n - batched;
  sddmm_planes(k, m, part, x + batched * s.c * s.h * s.w, dy + batched * s.o * s.oh * s.ow, dvalues);
}

}  // namespace dass
