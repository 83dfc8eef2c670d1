// Sparse times dense: the forward of linear, spmm and conv2d, and on the transpose their dX.
//
//   y[r, j] = act(bias[r] + sum_i values[i] x[column i, j] + residual[r, j])
//
// A slab of x lies in shared memory while every row of the tile takes the entries that fall into
// it; a row's columns rise, so these follow each other. Sums are float, in the order of the columns.
#include "tile.cuh"

namespace dass::cuda {
namespace {

struct Entry {
  float value;
  int k;  // row of the slab
};

template <class T>
struct SpmmParameters {
  PatternTensor pattern;
  Window window;
  const T* x;
  const T* values;
  const T* bias;
  const T* residual;
  T* y;
  int64_t columns;
  bool transposed;
  bool vector_in;   // four columns of x lie side by side
  bool vector_out;  // of y and the residual
  Activation activation;
};

// NaN stays NaN, as in torch: comparisons, not fmaxf.
__device__ __forceinline__ float activate(float v, Activation activation) {
  if (activation == kNone) return v;
  const float base = activation == kHardswish ? v + 3.f : v;
  float clamped = base < 0.f ? 0.f : base;
  if (activation == kRelu) return clamped;
  clamped = clamped > 6.f ? 6.f : clamped;
  return activation == kRelu6 ? clamped : v * clamped * (1.f / 6.f);
}

// Adds the entries of one row that lie in the slab from k0 on, from span.begin, which ends at the
// first behind it.
template <class T>
__device__ __forceinline__ void add_row(const Rows& rows, const T* values, int row, int k0, Span& span,
                                        Entry (&queue)[kWarpSize], const Slab<T>& slab, int lane,
                                        float (&sum)[Tile::kVector]) {
  int cursor = span.begin;
  const int end = span.end;
  while (cursor < end) {
    const int entry = cursor + lane;
    const int k = entry < end ? rows.indices[entry] - k0 : Tile::kDepth;
    const int count = __popc(__ballot_sync(kAllLanes, k < Tile::kDepth));
    if (lane < count) queue[lane] = {to_float(values[rows.place(entry, row)]), k};
    __syncwarp();
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
      const Entry e = queue[i];
      const Vec4<T> b = *reinterpret_cast<const Vec4<T>*>(&slab[e.k][lane * Tile::kVector]);
#pragma unroll
      for (int j = 0; j < Tile::kVector; ++j) sum[j] += e.value * to_float(b.v[j]);
    }
    __syncwarp();
    cursor += count;
    if (count < kWarpSize) break;
  }
  if (lane == 0) span.begin = cursor;
}

template <class T>
__device__ __forceinline__ float finish(const SpmmParameters<T>& p, int row, float sum, float residual) {
  return activate((p.bias ? sum + to_float(p.bias[row]) : sum) + residual, p.activation);
}

// Four finished columns of one row, planes side by side.
template <class T>
__device__ __forceinline__ void store_pixels(const SpmmParameters<T>& p, const Pixels& pixels, int row,
                                             const float (&sum)[Tile::kVector]) {
  const int plane = p.window.oh * p.window.ow;
  Vec4<T> residual{}, out;
  if (p.residual) residual = load_pixels(p.residual, pixels, p.window.o, row, plane, p.vector_out);
  for (int j = 0; j < Tile::kVector; ++j) {
    const float r = p.residual ? to_float(residual.v[j]) : 0.f;
    out.v[j] = from_float<T>(finish(p, row, sum[j], r));
  }
  if (p.vector_out && pixels.image[0] >= 0) {
    *reinterpret_cast<Vec4<T>*>(p.y + at_pixel(pixels.image[0], p.window.o, row, plane, pixels.pixel[0])) = out;
    return;
  }
  for (int j = 0; j < Tile::kVector; ++j)
    if (pixels.image[j] >= 0) p.y[at_pixel(pixels.image[j], p.window.o, row, plane, pixels.pixel[j])] = out.v[j];
}

// A column's outputs are neighbours: the tile goes through shared memory, so that lanes store
// neighbours too. The residual is laid out like y.
template <class T>
__device__ void store_rows(const SpmmParameters<T>& p, const Slab<T>& tile, int row0, int64_t column0) {
  const int count = p.window.o - row0 < Tile::kRows ? p.window.o - row0 : Tile::kRows;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kColumns; i += Tile::kThreads) {
    const int row = i % Tile::kRows, n = i / Tile::kRows;
    if (row < count && column0 + n < p.columns) p.y[(column0 + n) * p.window.o + row0 + row] = tile[row][n];
  }
}

template <class T, Layout kLayout>
__global__ void __launch_bounds__(Tile::kThreads, 2) spmm_csr_kernel(SpmmParameters<T> p) {
  DASS_SHARED(T, slab, [Tile::kDepth][Tile::kPitch]);
  DASS_SHARED(Entry, queue, [Tile::kWarps][kWarpSize]);
  DASS_SHARED(int, length, [Tile::kRows]);
  DASS_SHARED(RowsOfTile, tiles, [1]);
  RowsOfTile& tile = tiles[0];
  const Rows rows = read_rows(p.pattern, p.window, p.transposed);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int row0 = static_cast<int>(blockIdx.y) * Tile::kRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * Tile::kColumns;
  const int own = row0 + static_cast<int>(threadIdx.x);
  Span span{0, 0};
  if (threadIdx.x < Tile::kRows && own < rows.rows) span = {rows.begin(own), rows.end(own)};
  order_rows(own, span, tile, length);

  float sum[Tile::kWarpRows][Tile::kVector] = {};
  const Stage<T, kLayout> stage(p.window, column0, p.columns, lane);
  const int last = (row0 + Tile::kRows < rows.rows ? row0 + Tile::kRows : rows.rows) - 1;
  for (int g = row0 / rows.group_rows; g <= last / rows.group_rows; ++g) {
    const int first_channel = g * (rows.columns / rows.taps);
    for (int k0 = 0; k0 < rows.columns; k0 += Tile::kDepth) {
      __syncthreads();
      stage.fill(slab, p.x, p.window, first_channel, rows, k0, p.vector_in, warp, lane);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Tile::kWarpRows; ++i) {
        const int place = dealt_place(warp, i), row = tile.order[place];
        if (row / rows.group_rows == g)
          add_row(rows, p.values, row, k0, tile.span[place], queue[warp], slab, lane, sum[i]);
      }
    }
  }

  if constexpr (kLayout != Layout::kRows) {
    const Pixels pixels = pixels_from(column0 + lane * Tile::kVector, p.columns, p.window.oh * p.window.ow);
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; ++i) {
      const int row = tile.order[dealt_place(warp, i)];
      if (row < rows.rows) store_pixels(p, pixels, row, sum[i]);
    }
  } else {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kWarpRows; ++i) {
      const int row = tile.order[dealt_place(warp, i)];
      for (int j = 0; j < Tile::kVector; ++j) {
        const int64_t n = column0 + lane * Tile::kVector + j;
        if (row >= rows.rows || n >= p.columns) continue;
        const float r = p.residual ? to_float(p.residual[n * p.window.o + row]) : 0.f;
        slab[row - row0][lane * Tile::kVector + j] = from_float<T>(finish(p, row, sum[i][j], r));
      }
    }
    __syncthreads();
    store_rows(p, slab, row0, column0);
  }
}

template <class T>
const char* launch(const SpmmArguments& a, void* stream) {
  const Window& w = a.window;
  const int64_t plane_in = static_cast<int64_t>(w.h) * w.w, plane_out = static_cast<int64_t>(w.oh) * w.ow;
  const bool pointwise = w.kh == 1 && w.kw == 1 && w.sh == 1 && w.sw == 1 && w.uh == 1 && w.uw == 1 && w.pt == 0 &&
                         w.pl == 0 && w.oh == w.h && w.ow == w.w;
  SpmmParameters<T> p{};
  p.pattern = a.pattern;
  p.window = w;
  p.x = static_cast<const T*>(a.x);
  p.values = static_cast<const T*>(a.values);
  p.bias = static_cast<const T*>(a.bias);
  p.residual = static_cast<const T*>(a.residual);
  p.y = static_cast<T*>(a.y);
  p.columns = w.n * plane_out;
  p.transposed = a.transposed;
  p.vector_in = plane_in % 4 == 0 && aligned_to_four<T>(a.x);
  p.vector_out = plane_out % 4 == 0 && aligned_to_four<T>(a.y) && aligned_to_four<T>(a.residual);
  p.activation = a.activation;
  const dim3 grid(static_cast<unsigned>((p.columns + Tile::kColumns - 1) / Tile::kColumns),
                  static_cast<unsigned>((w.o + Tile::kRows - 1) / Tile::kRows));
  auto* kernel = &spmm_csr_kernel<T, Layout::kWindow>;
  if (pointwise) kernel = plane_in == 1 ? &spmm_csr_kernel<T, Layout::kRows> : &spmm_csr_kernel<T, Layout::kPlanes>;
  DASS_LAUNCH(kernel, grid, dim3(Tile::kThreads), stream, p);
  return launch_error();
}

}  // namespace

const char* spmm_csr(const SpmmArguments& a, void* stream) {
  return a.dtype == Dtype::kFloat ? launch<float>(a, stream) : launch<__half>(a, stream);
}

}  // namespace dass::cuda
