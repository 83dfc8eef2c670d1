// A sparse convolution as sparse rows times panels of pixels. Four ways to make the panels:
//
//   pointwise  1x1: a tile of pixels straight from the image, or copied first when it is read often
//   pixels     1x1 on small planes: tiles that run on from image to image
//   planes     k x k: padded planes of one image; a tap is an offset, tiles run across rows
//   lanes      batches: as many images as a register has lanes, side by side, so every tap is aligned
#pragma once
#include "pack.h"
#include "pattern.h"
#include "runtime.h"

namespace dass {

template <class T>
struct Epilogue {
  const T* bias;
  const T* residual;
  Activation activation;
};

// Copying a tile costs about as much as reading each of its columns five times in place.
constexpr double kReusePack = 5.5;
// Bytes of panel that should stay in L2 while all rows pass over it.
constexpr int64_t kPlaneBudget = 448 << 10;
constexpr int64_t kLanesBudget = 3 << 19;

template <class T>
SpmmTile<T> make_tile(const Matrix<T>& m, const Epilogue<T>& e) {
  SpmmTile<T> t{};
  t.values = m.values;
  t.indptr = m.indptr;
  t.outputs = m.outputs;
  t.bias = e.bias;
  t.residual = e.residual;
  t.activation = e.activation;
  return t;
}

// Block rows of `group` that belong to parts [first, last) of `parts`.
template <class T>
void set_rows(SpmmTile<T>& t, const Matrix<T>& m, int64_t group, int64_t first, int64_t last, int64_t parts) {
  const int64_t per = m.group_block_rows();
  t.row_begin = split_rows(m.indptr, group * per, (group + 1) * per, first, parts);
  t.row_end = split_rows(m.indptr, group * per, (group + 1) * per, last, parts);
}

// Channels per column block, so that what one tile reads of them stays in L1 next to the weights; all
// of them if a row would then meet too few nonzeros of a block to pay for passing its sums on.
constexpr int64_t kL1Budget = 44 << 10;
// With the batch innermost a tile reads whole aligned lines, and what spills to L2 comes back in time.
constexpr int64_t kL1LanesBudget = 64 << 10;
constexpr double kBlockNonzeros = 12.0;

template <class T>
int64_t block_channels(const Matrix<T>& m, int64_t bytes_per_channel, int64_t budget = kL1Budget) {
  const int64_t channels = m.channels();
  if (m.block > 1 || channels == 0 || m.block_rows == 0) return channels;
  const double row = static_cast<double>(m.indptr[m.block_rows]) / m.block_rows;
  const int64_t fit = std::max<int64_t>(1, budget / std::max<int64_t>(1, bytes_per_channel));
  const int64_t least =
      static_cast<int64_t>(std::min<double>(channels, std::max(1.0, kBlockNonzeros * channels / std::max(row, 1e-9))));
  const int64_t block = std::max(fit, least);
  return block >= channels ? channels : ceil_div(channels, ceil_div(channels, block));
}

// How entries find their pixels. Resolving those of a k x k convolution pays from some ten vectors a
// row on; before that the kernel looks each one up in the table of columns.
struct Entries {
  Address kind;
  const int32_t* indices;
  const int32_t* offsets;
  int64_t channel;  // span of one channel in the units of indices
};
constexpr int64_t kDirectVectors = 17;

template <class T>
Entries find_entries(const Matrix<T>& m, const Shape& s, const Plane& p, int64_t lanes, int64_t vectors) {
  int32_t* offsets = buffer(kOffsets).get<int32_t>(m.columns);
  fill_offsets(s, p, m.channels(), lanes, offsets);
  if (vectors < kDirectVectors) return {kTable, m.indices, offsets, m.taps};
  const int64_t count = m.indptr[m.block_rows];
  int32_t* direct = buffer(kDirectEntries).get<int32_t>(count);
  for (int64_t i = 0; i < count; ++i) direct[i] = offsets[m.indices[i]];
  return {kDirect, direct, offsets, p.channel * lanes};
}

template <class T>
Entries pitch_entries(const Matrix<T>& m) {
  return {kPitch, m.indices, nullptr, m.taps};
}

// Runs one tile, in column blocks of `block` channels if that is fewer than all.
template <class T>
void run_tile(const Kernels<T>& k, const Matrix<T>& m, SpmmTile<T> t, const Entries& a, int64_t vectors,
              int64_t block) {
  t.indices = a.indices;
  t.offsets = a.offsets;
  if (t.gap == 0) t.gap = t.out_gap = first_run(static_cast<int>(vectors)) * k.lanes;
  if (block >= m.channels() || t.row_begin == t.row_end) {
    k.spmm[a.kind][block_slot(m.block)][vectors - 1](t);
    return;
  }
  const int64_t rows = t.row_end - t.row_begin;
  t.partial = buffer(kPartial).get<T>(rows * vectors * k.lanes);
  t.cursors = buffer(kCursors).get<int32_t>(rows);
  for (int64_t c = 0; c < m.channels(); c += block) {
    t.first = c == 0;
    t.last = c + block >= m.channels();
    t.limit = static_cast<int32_t>(std::min(c + block, m.channels()) * a.channel);
    k.blocked[a.kind][vectors - 1](t);
  }
}

// Widest tile. Columns a constant pitch apart gain nothing from more than one run.
template <class T>
int64_t most_vectors(const Kernels<T>& k, const Matrix<T>& m, Address kind) {
  const int64_t most = k.max_vectors[block_slot(m.block)];
  return kind == kPitch ? std::min<int64_t>(most, kRunVectors) : most;
}

// A unit of work is one panel and all rows over it. With few units the threads pack each panel
// together and share it; with many each thread packs its own. pack(unit, panel, lo, hi) packs channels
// [lo, hi); run(unit, panel, first, last, parts) does the rows of parts [first, last).
template <class T, class Pack, class Run>
void for_panels(int64_t units, int64_t channels, int64_t elements, const Pack& pack, const Run& run) {
  const int64_t parts = std::max<int64_t>(1, torch::stable::get_num_threads());
  if (parts == 1 || units % parts == 0 || units >= 8 * parts) {
    for_units(units, [&](int64_t unit, int64_t first, int64_t last, int64_t parts) {
      T* panel = buffer(kPanel).get<T>(elements);
      pack(unit, panel, 0, channels);
      run(unit, panel, first, last, parts);
    });
    return;
  }
  T* panel = buffer(kPanel).get<T>(elements);
  for (int64_t unit = 0; unit < units; ++unit) {
    for_channels(channels, [&](int64_t lo, int64_t hi) { pack(unit, panel, lo, hi); });
    for_units(1, [&](int64_t, int64_t first, int64_t last, int64_t parts) { run(unit, panel, first, last, parts); });
  }
}

// Even tiles of at most `most` vectors.
inline int64_t tile_vectors(int64_t vectors, int64_t most) { return ceil_div(vectors, ceil_div(vectors, most)); }

template <class T>
void conv_pointwise(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, T* y, const Epilogue<T>& e) {
  const int64_t pixels = s.h * s.w, lanes = k.lanes, cg = m.channels();
  const int64_t vectors = tile_vectors(ceil_div(pixels, lanes), most_vectors(k, m, kPitch));
  const int64_t width = vectors * lanes, tiles = ceil_div(pixels, width);
  const bool pack = m.reuse() >= kReusePack;
  const int64_t block = block_channels(m, width * static_cast<int64_t>(sizeof(T)));
  for_units(s.n * m.groups * tiles, [&](int64_t unit, int64_t first, int64_t last, int64_t parts) {
    const int64_t p0 = unit % tiles * width, g = unit / tiles % m.groups, n = unit / tiles / m.groups;
    const int64_t count = std::min(width, pixels - p0), v = ceil_div(count, lanes);
    SpmmTile<T> t = make_tile(m, e);
    set_rows(t, m, g, first, last, parts);
    const T* src = x + (n * s.c + g * cg) * pixels + p0;
    if (pack || count % lanes) {
      t.pitch = v * lanes;
      T* panel = buffer(kPanel).get<T>(cg * t.pitch);
      for (int64_t c = 0; c < cg; ++c) {
        std::memcpy(panel + c * t.pitch, src + c * pixels, count * sizeof(T));
        std::memset(panel + c * t.pitch + count, 0, (t.pitch - count) * sizeof(T));
      }
      t.x = panel;
    } else {
      t.pitch = pixels;
      t.x = src;
    }
    t.y = y + n * s.o * pixels + p0;
    t.ldy = t.ldr = pixels;
    if (t.residual) t.residual += n * s.o * pixels + p0;
    t.tail = static_cast<int32_t>(count - (v - 1) * lanes);
    run_tile(k, m, t, pitch_entries(m), v, pack ? block : cg);
  });
}

// 1x1 on small planes: tiles of pixels run on from image to image, so that no lanes are wasted (7 x 7
// fills 49 of 64). The outputs of some rows are collected before they go to their images.
constexpr int64_t kRowChunk = 256;

template <class T>
void conv_pixels(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, T* y, const Epilogue<T>& e) {
  const int64_t pixels = s.h * s.w, lanes = k.lanes, cg = m.channels(), total = s.n * pixels;
  const int64_t vectors = tile_vectors(ceil_div(total, lanes), most_vectors(k, m, kPitch));
  const int64_t width = vectors * lanes;
  const int64_t tiles = ceil_div(total, width), block = block_channels(m, width * static_cast<int64_t>(sizeof(T)));
  const int64_t chunk = std::max<int64_t>(1, kRowChunk / m.block);
  for_units(m.groups * tiles, [&](int64_t unit, int64_t first, int64_t last, int64_t parts) {
    const int64_t q0 = unit % tiles * width, g = unit / tiles;
    const int64_t count = std::min(width, total - q0), v = ceil_div(count, lanes);
    SpmmTile<T> t = make_tile(m, e);
    set_rows(t, m, g, first, last, parts);
    t.pitch = t.ldy = v * lanes;
    t.tail = static_cast<int32_t>(lanes);
    T* panel = buffer(kPanel).get<T>(cg * t.pitch);
    gather_pixels(x + g * cg * pixels, s.c * pixels, pixels, cg, q0, count, t.pitch, panel);
    t.x = panel;
    T* out = buffer(kOutput).get<T>(chunk * m.block * t.ldy);
    for (int64_t r = t.row_begin, end = t.row_end; r < end; r += chunk) {
      t.row_begin = r;
      t.row_end = std::min(r + chunk, end);
      t.y = out - r * m.block * t.ldy;
      run_tile(k, m, t, pitch_entries(m), v, block);
      for (int64_t o = r * m.block; o < std::min(t.row_end * m.block, m.outputs); ++o)
        scatter_pixels(t.y + o * t.ldy, s.o * pixels, pixels, q0, count, y + o * pixels);
    }
  });
}

// Which lanes of each vector of a flat tile of `rows` output rows are pixels, and where they go.
inline void fill_masks(const Shape& s, const Plane& p, int64_t rows, int64_t lanes, uint32_t* masks, int32_t* outs) {
  const int64_t total = ceil_div((rows - 1) * p.stride + s.ow, lanes);
  std::memset(masks, 0, total * sizeof(uint32_t));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t f = r * p.stride, end = f + s.ow; f < end;) {
      const int64_t v = f / lanes, lane = f % lanes, n = std::min(lanes - lane, end - f);
      masks[v] |= ((uint64_t{1} << n) - 1) << lane;
      f += n;
    }
  }
  int32_t at = 0;
  for (int64_t v = 0; v < total; ++v) {
    outs[v] = at;
    at += __builtin_popcount(masks[v]);
  }
}

// Output rows per panel, so that `channels` planes fit the budget.
inline int64_t panel_rows(const Shape& s, int64_t channels, int64_t lanes, int64_t elem, int64_t budget) {
  const int64_t row =
      channels * lanes * elem * (s.ow + (s.kw - 1) * s.dw) * std::min(s.sw, s.kw) * std::min(s.sh, s.kh);
  const int64_t halo = (s.kh - 1) * s.dh / s.sh;
  const int64_t most = std::max<int64_t>(1, budget / std::max<int64_t>(1, row) - halo);
  return ceil_div(s.oh, ceil_div(s.oh, std::min(s.oh, most)));
}

template <class T>
void conv_planes(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, T* y, const Epilogue<T>& e) {
  const int64_t lanes = k.lanes, cg = m.channels();
  const int64_t rows = panel_rows(s, cg, 1, sizeof(T), kPlaneBudget);
  const Plane p = make_plane(s, rows, true, lanes, sizeof(T));
  const int64_t tiles = ceil_div(s.oh, rows), last_rows = s.oh - (tiles - 1) * rows;
  const int64_t vmax = ceil_div((rows - 1) * p.stride + s.ow, lanes);
  const Entries a = find_entries(m, s, p, 1, s.n * tiles * vmax);
  const int64_t reach = (s.kh - 1) * s.dh / s.sh * p.stride + (s.kw - 1) * s.dw / s.sw;
  const int64_t block = block_channels(m, static_cast<int64_t>(sizeof(T) * p.phases.size()) *
                                              (tile_vectors(vmax, most_vectors(k, m, kDirect)) * lanes + reach));
  auto* masks = buffer(kOther).get<uint32_t>(4 * vmax);
  auto* outs = reinterpret_cast<int32_t*>(masks + 2 * vmax);
  fill_masks(s, p, rows, lanes, masks, outs);
  fill_masks(s, p, last_rows, lanes, masks + vmax, outs + vmax);
  const auto pack = [&](int64_t unit, T* panel, int64_t lo, int64_t hi) {
    const int64_t oy0 = unit % tiles * rows, g = unit / tiles % m.groups, n = unit / tiles / m.groups;
    pack_planes(s, p, hi - lo, oy0, x + (n * s.c + g * cg + lo) * s.h * s.w, panel + lo * p.channel);
  };
  const auto run = [&](int64_t unit, T* panel, int64_t first, int64_t last, int64_t parts) {
    const int64_t oy0 = unit % tiles * rows, g = unit / tiles % m.groups, n = unit / tiles / m.groups;
    const bool whole = oy0 + rows <= s.oh;
    const int64_t count = whole ? rows : last_rows;
    SpmmTile<T> t = make_tile(m, e);
    set_rows(t, m, g, first, last, parts);
    t.ldy = t.ldr = s.oh * s.ow;
    const int64_t at = n * s.o * t.ldy + oy0 * s.ow;
    t.y = y + at;
    if (t.residual) t.residual += at;
    const int64_t total = ceil_div((count - 1) * p.stride + s.ow, lanes);
    const int64_t step = tile_vectors(total, most_vectors(k, m, kDirect));
    for (int64_t v = 0; v < total; v += step) {
      t.x = panel + v * lanes;
      t.masks = masks + (whole ? 0 : vmax) + v;
      t.outs = outs + (whole ? 0 : vmax) + v;
      const int64_t n_v = std::min(step, total - v);
      run_tile(k, m, t, a, n_v, block);
    }
  };
  for_panels<T>(s.n * m.groups * tiles, cg, cg * p.channel, pack, run);
}

// Tiles of the lanes way, `rows` x `columns` pixels. Two rows, the two runs of a tile, share most of
// the pixels that their taps read.
struct LaneTiles {
  int64_t rows;
  int64_t columns;
};

template <class T>
LaneTiles lane_tiles(const Kernels<T>& k, const Matrix<T>& m, const Shape& s) {
  const int64_t most = most_vectors(k, m, kDirect);
  const int64_t columns = tile_vectors(s.ow, std::min<int64_t>(kRunVectors, std::max<int64_t>(1, most / 2)));
  if (s.oh > 1 && s.kh > 1 && 2 * columns > kRunVectors) return {2, columns};
  return {1, tile_vectors(s.ow, most)};
}

// Channels per column block of such tiles.
template <class T>
int64_t lane_block(const Matrix<T>& m, const Shape& s, const LaneTiles& tiles, int64_t phases, int64_t lanes) {
  const int64_t high = (s.kh - 1) * s.dh / s.sh + tiles.rows, wide = (s.kw - 1) * s.dw / s.sw + tiles.columns;
  return block_channels(m, static_cast<int64_t>(sizeof(T)) * phases * high * wide * lanes, kL1LanesBudget);
}

// Runs `rows` (at most two) x `columns` pixels from the corner that t.x and t.y point to; `in_row` and
// `out_row` are elements from a row to the next. What fits one run is done row by row.
template <class T>
void run_lane_tile(const Kernels<T>& k, const Matrix<T>& m, SpmmTile<T> t, const Entries& a, int64_t rows,
                   int64_t columns, int64_t in_row, int64_t out_row, int64_t block) {
  if (rows == 2 && 2 * columns > kRunVectors) {
    t.gap = in_row;
    t.out_gap = out_row;
    return run_tile(k, m, t, a, 2 * columns, block);
  }
  for (int64_t row = 0; row < rows; ++row, t.x += in_row, t.y += out_row) run_tile(k, m, t, a, columns, block);
}

// `lanes` images at a time; s.n is a multiple of lanes. No residual: it would have to be transposed.
template <class T>
void conv_lanes(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, T* y, const Epilogue<T>& e) {
  const int64_t lanes = k.lanes, cg = m.channels();
  const int64_t rows = panel_rows(s, cg, lanes, sizeof(T), kLanesBudget);
  const Plane p = make_plane(s, rows, false, 1, sizeof(T) * lanes);
  const int64_t panels = ceil_div(s.oh, rows), pixels = s.oh * s.ow;
  const Entries a = find_entries(m, s, p, lanes, s.n * s.oh * s.ow);
  const LaneTiles tiles = lane_tiles(k, m, s);
  const int64_t block = lane_block(m, s, tiles, static_cast<int64_t>(p.phases.size()), lanes);
  const auto pack = [&](int64_t unit, T* panel, int64_t lo, int64_t hi) {
    const int64_t oy0 = unit % panels * rows, g = unit / panels % m.groups, n = unit / panels / m.groups * lanes;
    pack_lanes(k, s, p, hi - lo, oy0, x + (n * s.c + g * cg + lo) * s.h * s.w, panel + lo * p.channel * lanes,
               buffer(kOther).get<T>(s.w * lanes));
  };
  const auto run = [&](int64_t unit, T* panel, int64_t first, int64_t last, int64_t parts) {
    const int64_t oy0 = unit % panels * rows, g = unit / panels % m.groups, n = unit / panels / m.groups * lanes;
    SpmmTile<T> t = make_tile(m, e);
    set_rows(t, m, g, first, last, parts);
    if (t.row_begin == t.row_end) return;
    const int64_t o0 = t.row_begin * m.block, o1 = std::min(t.row_end * m.block, m.outputs);
    t.ldy = tiles.rows * s.ow * lanes;
    T* out = buffer(kOutput).get<T>((o1 - o0) * t.ldy);
    t.tail = static_cast<int32_t>(lanes);
    for (int64_t oy = oy0, end = std::min(oy0 + rows, s.oh); oy < end; oy += tiles.rows) {
      const int64_t deep = std::min(tiles.rows, end - oy);
      for (int64_t ox = 0; ox < s.ow; ox += tiles.columns) {
        t.x = panel + ((oy - oy0) * p.stride + ox) * lanes;
        t.y = out - o0 * t.ldy + ox * lanes;
        run_lane_tile(k, m, t, a, deep, std::min(tiles.columns, s.ow - ox), p.stride * lanes, s.ow * lanes, block);
      }
      for (int64_t o = o0; o < o1; ++o)
        k.transpose(out + (o - o0) * t.ldy, lanes, y + (n * s.o + o) * pixels + oy * s.ow, s.o * pixels, deep * s.ow,
                    lanes);
    }
  };
  for_panels<T>(s.n / lanes * m.groups * panels, cg, cg * p.channel * lanes, pack, run);
}

// The lanes way on data that lies so already: x [n, c, h, w, lanes] holds its padding, with any pitch
// between images and channels; y is [n, o, oh, ow, lanes]. Strides of one only: an output's neighbours must be its
// input's.
template <class T>
void conv_in_lanes(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, int64_t image, int64_t channel,
                   T* y, const Epilogue<T>& e) {
  const int64_t lanes = k.lanes, cg = m.channels();
  Plane p;
  p.stride = s.w;
  p.phase = s.h * s.w;
  p.channel = channel / lanes;
  p.phases = {{0, 0}};
  const Entries a = find_entries(m, s, p, lanes, s.n * s.oh * s.ow);
  const LaneTiles tiles = lane_tiles(k, m, s);
  const int64_t rows = ceil_div(s.oh, tiles.rows), block = lane_block(m, s, tiles, 1, lanes);
  for_units(s.n * m.groups * rows, [&](int64_t unit, int64_t first, int64_t last, int64_t parts) {
    const int64_t oy = unit % rows * tiles.rows, g = unit / rows % m.groups, n = unit / rows / m.groups;
    SpmmTile<T> t = make_tile(m, e);
    set_rows(t, m, g, first, last, parts);
    t.ldy = s.oh * s.ow * lanes;
    t.tail = static_cast<int32_t>(lanes);
    for (int64_t ox = 0; ox < s.ow; ox += tiles.columns) {
      t.x = x + n * image + g * cg * channel + (oy * s.w + ox) * lanes;
      t.y = y + n * s.o * t.ldy + (oy * s.ow + ox) * lanes;
      run_lane_tile(k, m, t, a, std::min(tiles.rows, s.oh - oy), std::min(tiles.columns, s.ow - ox), s.w * lanes,
                    s.ow * lanes, block);
    }
  });
}

// Images side by side pay for two transpositions; with few nonzeros a column that is not won back.
template <class T>
bool lanes_pay(const Kernels<T>& k, const Matrix<T>& m, const Shape& s) {
  return s.n >= k.lanes && !s.pointwise() && m.reuse() >= 2.0;
}

// Whether whole vectors would waste more than a seventh of their lanes on each image.
template <class T>
bool pixels_pay(const Kernels<T>& k, const Shape& s) {
  const int64_t pixels = s.h * s.w;
  return s.n > 1 && pixels * 100 < ceil_div(pixels, k.lanes) * k.lanes * 86;
}

template <class T>
void run_conv(const Kernels<T>& k, const Matrix<T>& m, const Shape& s, const T* x, T* y, const Epilogue<T>& e) {
  if (s.n == 0 || s.o == 0 || s.oh == 0 || s.ow == 0) return;
  int64_t done = 0;
  if (!e.residual && lanes_pay(k, m, s)) {
    Shape most = s;
    most.n = done = s.n / k.lanes * k.lanes;
    conv_lanes(k, m, most, x, y, e);
  }
  if (done == s.n) return;
  Shape rest = s;
  rest.n = s.n - done;
  x += done * s.c * s.h * s.w;
  y += done * s.o * s.oh * s.ow;
  if (!s.pointwise())
    conv_planes(k, m, rest, x, y, e);
  else if (!e.residual && pixels_pay(k, s))
    conv_pixels(k, m, rest, x, y, e);
  else
    conv_pointwise(k, m, rest, x, y, e);
}

}  // namespace dass
