// The tile both products work on, and how its columns are brought into shared memory.
//
// A block of threads holds 64 rows of the sparse matrix. The dense operand passes by in slabs of 64
// rows (of one group's channel * taps + tap) by 128 columns (output pixels), a lane holding four
// neighbouring columns. No slab exists in memory: the taps of a convolution are resolved here.
#pragma once
#include "pattern.cuh"

namespace dass::cuda {

struct Tile {
  static constexpr int kRows = 64;
  static constexpr int kColumns = 128;
  static constexpr int kDepth = 64;
  static constexpr int kVector = 4;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpRows = kRows / kWarps;
  // Four more than a row needs: a transposed store then meets every bank once (see stage_rows).
  static constexpr int kPitch = kColumns + 4;

  static_assert(kColumns == kWarpSize * kVector, "a warp holds all columns of a row");
  static_assert(kRows % kWarps == 0, "every warp has as many rows");
  static_assert(kPitch % kVector == 0, "a row starts where four can be read at a time");
  static_assert(kRows == kDepth, "a slab's memory also takes the finished tile");
  static_assert(kDepth * kPitch * sizeof(float) + kWarps * kWarpSize * 8 + kRows * 8 <= 48 << 10,
                "shared memory that every GPU gives without being asked");
};

template <class T>
using Slab = T[Tile::kDepth][Tile::kPitch];

// The four columns of a lane: pixels of the output, across images.
struct Pixels {
  int image[4];  // index of the image, or -1 behind the last column
  int pixel[4];  // in its plane
};

__device__ inline Pixels pixels_from(int64_t column, int64_t columns, int plane) {
  Pixels p;
  for (int j = 0; j < 4; ++j) {
    const bool inside = column + j < columns;
    p.image[j] = inside ? static_cast<int>((column + j) / plane) : -1;
    p.pixel[j] = inside ? static_cast<int>((column + j) % plane) : 0;
  }
  return p;
}

__device__ __forceinline__ int64_t at_pixel(int image, int channels, int channel, int plane, int pixel) {
  return (static_cast<int64_t>(image) * channels + channel) * plane + pixel;
}

// Reads four columns of row `channel` of planes of `plane` elements. With `vector` they lie side by
// side, which the host knows from the size of a plane and the address.
template <class T>
__device__ __forceinline__ Vec4<T> load_pixels(const T* x, const Pixels& p, int channels, int channel, int plane,
                                               bool vector) {
  Vec4<T> out;
  if (vector && p.image[0] >= 0) {
    out = *reinterpret_cast<const Vec4<T>*>(x + at_pixel(p.image[0], channels, channel, plane, p.pixel[0]));
  } else {
    for (int j = 0; j < 4; ++j)
      out.v[j] = p.image[j] < 0 ? from_float<T>(0.f) : x[at_pixel(p.image[j], channels, channel, plane, p.pixel[j])];
  }
  return out;
}

// Where the columns' windows start, in the input stretched by uh and uw.
struct Corners {
  int image[4], y[4], x[4];
};

__device__ inline Corners corners_of(const Pixels& p, const Window& w) {
  Corners c;
  for (int j = 0; j < 4; ++j) {
    c.image[j] = p.image[j];
    c.y[j] = p.pixel[j] / w.ow * w.sh - w.pt;
    c.x[j] = p.pixel[j] % w.ow * w.sw - w.pl;
  }
  return c;
}

template <class T>
__device__ __forceinline__ Vec4<T> load_window(const T* x, const Corners& c, const Window& w, int channel, int ty,
                                               int tx) {
  Vec4<T> out;
  for (int j = 0; j < 4; ++j) {
    int py = c.y[j] + ty * w.dh, px = c.x[j] + tx * w.dw;
    bool inside = c.image[j] >= 0 && py >= 0 && px >= 0;
    if (w.uh > 1) {
      inside = inside && py % w.uh == 0;
      py /= w.uh;
    }
    if (w.uw > 1) {
      inside = inside && px % w.uw == 0;
      px /= w.uw;
    }
    inside = inside && py < w.h && px < w.w;
    out.v[j] = inside ? x[(at_pixel(c.image[j], w.c, channel, w.h, py)) * w.w + px] : from_float<T>(0.f);
  }
  return out;
}

// How the columns lie in memory.
enum class Layout {
  kPlanes,  // 1 x 1: pixel j of a channel
  kWindow,  // any convolution
  kRows,    // images of one pixel, as in a linear layer: a column's channels are neighbours
};

// Rows [k0, k0 + kDepth) of a group's slab; rows behind the last stay as they are, nobody reads them.
template <class T, Layout kLayout>
struct Stage {
  Pixels pixels;
  Corners corners;
  int64_t first_column;
  int64_t columns;

  __device__ Stage(const Window& w, int64_t first, int64_t count, int lane) : first_column(first), columns(count) {
    if constexpr (kLayout == Layout::kRows) return;
    pixels = pixels_from(first + lane * Tile::kVector, count, w.oh * w.ow);
    if (kLayout == Layout::kWindow) corners = corners_of(pixels, w);
  }

  __device__ void fill(Slab<T>& slab, const T* x, const Window& w, int first_channel, const Rows& rows, int k0,
                       bool vector, int warp, int lane) const {
    const int depth = rows.columns - k0 < Tile::kDepth ? rows.columns - k0 : Tile::kDepth;
    if constexpr (kLayout == Layout::kRows)
      fill_from_rows(slab, x + first_channel + k0, w.c, depth, warp, lane);
    else
      fill_from_planes(slab, x, w, first_channel, rows.taps, k0, depth, vector, warp, lane);
  }

 private:
  __device__ void fill_from_planes(Slab<T>& slab, const T* x, const Window& w, int first_channel, int taps, int k0,
                                   int depth, bool vector, int warp, int lane) const {
    for (int k = warp; k < depth; k += Tile::kWarps) {
      const int channel = (k0 + k) / taps, tap = (k0 + k) % taps;
      Vec4<T>* to = reinterpret_cast<Vec4<T>*>(&slab[k][lane * Tile::kVector]);
      if constexpr (kLayout == Layout::kPlanes)
        *to = load_pixels(x, pixels, w.c, first_channel + channel, w.h * w.w, vector);
      else
        *to = load_window(x, corners, w, first_channel + channel, tap / w.kw, tap % w.kw);
    }
  }

  // A warp reads eight neighbouring channels of four columns: whole sectors. Bank (4 k + n) % 32
  // takes the store, another one for every lane.
  __device__ void fill_from_rows(Slab<T>& slab, const T* x, int64_t pitch, int depth, int warp, int lane) const {
    for (int n = warp * 4 + lane / 8; n < Tile::kColumns; n += Tile::kWarps * 4) {
      const bool inside = first_column + n < columns;
      for (int k = lane % 8; k < depth; k += 8)
        slab[k][n] = inside ? x[(first_column + n) * pitch + k] : from_float<T>(0.f);
    }
  }
};

// Row swizzle: the rows of a tile from the longest to the shortest, dealt to the warps there and
// back, so that none is left with all the long ones. order[i] is the row at place i, and comes with
// the entries [begin[i], end[i]) that are its own; rows behind the last have none. Ends with a barrier.
struct Span {
  int begin, end;
};
struct RowsOfTile {
  int order[Tile::kRows];
  Span span[Tile::kRows];
};

__device__ inline void order_rows(int row, Span span, RowsOfTile& tile, int (&length)[Tile::kRows]) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < Tile::kRows) length[t] = span.end - span.begin;
  __syncthreads();
  if (t < Tile::kRows) {
    int place = 0;
    for (int i = 0; i < Tile::kRows; ++i) place += length[i] > length[t] || (length[i] == length[t] && i < t);
    tile.order[place] = row;
    tile.span[place] = span;
  }
  __syncthreads();
}

__device__ __forceinline__ int dealt_place(int warp, int i) {
  return i * Tile::kWarps + (i % 2 ? Tile::kWarps - 1 - warp : warp);
}

}  // namespace dass::cuda
