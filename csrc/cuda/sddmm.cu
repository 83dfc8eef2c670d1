// The sampled dense-dense product: the weight gradient on the mask.
//
//   dvalues[i] = sum_j dy[row i, j] x[column i, j]
//
// A block of threads has 64 rows and one slab of 64 columns of the weight, and walks over every
// `splits`-th chunk of 128 pixels. A lane multiplies its four pixels; a warp adds up four entries at
// a time. One warp owns an entry, so the sums have a fixed order and need no atomics.
#include "tile.cuh"

namespace dass::cuda {
namespace {

template <class T>
struct SddmmParameters {
  PatternTensor pattern;
  Window window;
  const T* x;
  const T* dy;
  float* partial;
  int64_t columns;
  bool vector_in;
  bool vector_out;
};

// First entry in [begin, end) whose column is not below k.
__device__ inline int first_from(const int32_t* indices, int begin, int end, int k) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (indices[middle] < k)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// Sums over the warp of four numbers per lane; lanes 8 q to 8 q + 7 get that of v[q].
__device__ __forceinline__ float sum_of_four(const float (&v)[4], int lane) {
  const bool upper = lane & 16, odd = lane & 8;
  float a = upper ? v[2] : v[0], b = upper ? v[3] : v[1];
  a += __shfl_xor_sync(kAllLanes, upper ? v[0] : v[2], 16);
  b += __shfl_xor_sync(kAllLanes, upper ? v[1] : v[3], 16);
  float s = odd ? b : a;
  s += __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
  for (int step = 4; step > 0; step /= 2) s += __shfl_xor_sync(kAllLanes, s, step);
  return s;
}

// Adds the chunk's share of entries [begin, end) of one row, whose four gradients a lane holds.
template <class T>
__device__ __forceinline__ void add_entries(const Rows& rows, int row, int begin, int end, int k0, const Slab<T>& slab,
                                            const float (&dy)[Tile::kVector], int lane, float* partial) {
  for (int e = begin; e < end; e += 4) {
    float products[4] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (e + q >= end) break;
      const int k = rows.indices[e + q] - k0;
      const Vec4<T> b = *reinterpret_cast<const Vec4<T>*>(&slab[k][lane * Tile::kVector]);
#pragma unroll
      for (int j = 0; j < Tile::kVector; ++j) products[q] += dy[j] * to_float(b.v[j]);
    }
    const float total = sum_of_four(products, lane);
    const int entry = e + lane / 8;
    if (lane % 8 == 0 && entry < end) partial[rows.place(entry, row)] += total;
  }
}

template <class T, Layout kLayout>
__global__ void __launch_bounds__(Tile::kThreads, 2) sddmm_csr_kernel(SddmmParameters<T> p) {
  DASS_SHARED(T, slab, [Tile::kDepth][Tile::kPitch]);
  DASS_SHARED(int, length, [Tile::kRows]);
  DASS_SHARED(RowsOfTile, tiles, [1]);
  const RowsOfTile& tile = tiles[0];
  const Rows rows = read_rows(p.pattern, p.window, false);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int row0 = static_cast<int>(blockIdx.x) * Tile::kRows, k0 = static_cast<int>(blockIdx.y) * Tile::kDepth;
  if (k0 >= rows.columns) return;  // the grid allows for one group
  float* partial = p.partial + static_cast<int64_t>(blockIdx.z) * p.pattern.value_count;
  const int own = row0 + static_cast<int>(threadIdx.x);
  Span span{0, 0};
  if (threadIdx.x < Tile::kRows && own < rows.rows) {
    span.begin = first_from(rows.indices, rows.begin(own), rows.end(own), k0);
    span.end = first_from(rows.indices, span.begin, rows.end(own), k0 + Tile::kDepth);
  }
  order_rows(own, span, tiles[0], length);

  const int plane = p.window.oh * p.window.ow;
  const int last = (row0 + Tile::kRows < rows.rows ? row0 + Tile::kRows : rows.rows) - 1;
  for (int64_t c = static_cast<int64_t>(blockIdx.z) * Tile::kColumns; c < p.columns;
       c += static_cast<int64_t>(gridDim.z) * Tile::kColumns) {
    const Stage<T, kLayout> stage(p.window, c, p.columns, lane);
    const Pixels pixels = pixels_from(c + lane * Tile::kVector, p.columns, plane);
    for (int g = row0 / rows.group_rows; g <= last / rows.group_rows; ++g) {
      const int first_channel = g * (rows.columns / rows.taps);
      __syncthreads();
      stage.fill(slab, p.x, p.window, first_channel, rows, k0, p.vector_in, warp, lane);
      __syncthreads();
      for (int i = 0; i < Tile::kWarpRows; ++i) {
        const int place = dealt_place(warp, i), row = tile.order[place];
        const Span entries = tile.span[place];
        if (entries.begin == entries.end || row / rows.group_rows != g) continue;
        const Vec4<T> grads = load_pixels(p.dy, pixels, p.window.o, row, plane, p.vector_out);
        float dy[Tile::kVector];
#pragma unroll
        for (int j = 0; j < Tile::kVector; ++j) dy[j] = to_float(grads.v[j]);
        add_entries(rows, row, entries.begin, entries.end, k0, slab, dy, lane, partial);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(256) sum_splits_kernel(const float* partial, int splits, int64_t count, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = 0.f;
  for (int s = 0; s < splits; ++s) sum += partial[s * count + i];
  out[i] = from_float<T>(sum);
}

template <class T>
const char* launch(const SddmmArguments& a, void* stream) {
  const Window& w = a.window;
  const int64_t plane_in = static_cast<int64_t>(w.h) * w.w, plane_out = static_cast<int64_t>(w.oh) * w.ow;
  const bool pointwise =
      w.kh == 1 && w.kw == 1 && w.sh == 1 && w.sw == 1 && w.pt == 0 && w.pl == 0 && w.oh == w.h && w.ow == w.w;
  SddmmParameters<T> p{};
  p.pattern = a.pattern;
  p.window = w;
  p.x = static_cast<const T*>(a.x);
  p.dy = static_cast<const T*>(a.dy);
  p.partial = a.partial;
  p.columns = w.n * plane_out;
  p.vector_in = plane_in % 4 == 0 && aligned_to_four<T>(a.x);
  p.vector_out = plane_out % 4 == 0 && aligned_to_four<T>(a.dy);
  const int64_t depth = static_cast<int64_t>(w.c) * w.kh * w.kw;
  const dim3 grid(static_cast<unsigned>((w.o + Tile::kRows - 1) / Tile::kRows),
                  static_cast<unsigned>((depth + Tile::kDepth - 1) / Tile::kDepth), static_cast<unsigned>(a.splits));
  auto* kernel = &sddmm_csr_kernel<T, Layout::kWindow>;
  if (pointwise) kernel = plane_in == 1 ? &sddmm_csr_kernel<T, Layout::kRows> : &sddmm_csr_kernel<T, Layout::kPlanes>;
  DASS_LAUNCH(kernel, grid, dim3(Tile::kThreads), stream, p);
  if (const char* error = launch_error()) return error;
  if (!a.dvalues) return nullptr;
  auto* sum = &sum_splits_kernel<T>;
  const int64_t count = a.pattern.value_count;
  DASS_LAUNCH(sum, dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), stream,
              static_cast<const float*>(a.partial), a.splits, count, static_cast<T*>(a.dvalues));
  return launch_error();
}

}  // namespace

// Enough blocks for two on each of a large GPU's 132 multiprocessors, but each with a chunk to do.
int sddmm_splits(const Window& w) {
  const int64_t chunks = (static_cast<int64_t>(w.n) * w.oh * w.ow + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t tiles = ((static_cast<int64_t>(w.o) + Tile::kRows - 1) / Tile::kRows) *
                        ((static_cast<int64_t>(w.c) * w.kh * w.kw + Tile::kDepth - 1) / Tile::kDepth);
  const int64_t wanted = (264 + tiles - 1) / tiles;
  const int64_t splits = wanted < chunks ? wanted : chunks;
  return splits < 1 ? 1 : static_cast<int>(splits < 64 ? splits : 64);
}

const char* sddmm_csr(const SddmmArguments& a, void* stream) {
  return a.dtype == Dtype::kFloat ? launch<float>(a, stream) : launch<__half>(a, stream);
}

}  // namespace dass::cuda
