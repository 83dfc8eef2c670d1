// A compiled network: steps over pictures in one piece of memory.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/dense.h"
#include "../cpu/kernels.h"

namespace dass {

// Where a picture lies and how. Element (c, y, x) is at offset + c * channel + (y * pitch + x) * pixel
// floats of its space. With `pad` > 0 as many rows of zeros lie between planes and, between rows, zeros
// from the last column to the pitch: at least `pad` pixels, which serve both rows.
struct Place {
  int64_t space = 0;  // 0: the arena; s: the s-th tensor of the call
  int64_t offset = 0;
  int64_t channels = 0, rows = 0, columns = 0;
  int64_t channel = 0, pitch = 0, pad = 0, pixel = 1;

  int64_t end() const { return ((rows - 1) * pitch + columns) * pixel; }  // of a plane
  int64_t zeros() const { return pad ? (pitch - columns) * pixel : 0; }   // behind a row
};

// One pass through a program: for one image, or for as many as a register has lanes.
struct Pass {
  float* arena;
  std::vector<float*> tensors;  // of the call, at this pass's first image
  std::vector<int64_t> images_apart;
  int64_t images;  // that there are, at most `pixel`

  float* at(const Place& p) const { return (p.space ? tensors[p.space - 1] : arena) + p.offset; }
};

class Step {
 public:
  virtual ~Step() = default;
  // Part `part` of `parts`; parts may run at the same time.
  virtual void run(const Pass& pass, int64_t part, int64_t parts) const = 0;
  // What it runs on, for people: "emitted 28x1", "spmm 8 vectors".
  virtual std::string kernel() const { return ""; }
};

using StepPtr = std::unique_ptr<Step>;

// The part of `count` things, [first, second).
inline std::pair<int64_t, int64_t> share(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Zeros behind the planes of channels [first, last), from `from` floats on, and in front of the first.
inline void zero_around(const Pass& pass, const Place& p, int64_t from, int64_t first, int64_t last) {
  if (p.pad == 0) return;
  float* y = pass.at(p);
  const int64_t front = (p.pad * p.pitch + p.pad) * p.pixel;
  if (first == 0 && last > 0) std::memset(y - front, 0, front * sizeof(float));
  for (int64_t c = first; c < last; ++c)
    for (int64_t i = from; i < p.channel; ++i) y[c * p.channel + i] = 0.0f;
}

// Memory of the calling thread, aligned to a line; it only grows.
enum ScratchSlot { kHiddenScratch, kStripScratch, kPartialScratch, kScratchSlots };
float* scratch_floats(ScratchSlot slot, int64_t floats);

inline PlanesOut planes_out(const Pass& pass, const Place& p, int64_t first, int64_t last) {
  return {pass.at(p) + first * p.channel, p.channel, p.pitch, last - first, p.rows, p.columns, p.pixel, p.zeros()};
}

// One product: how its rows are run.
struct RowsKernel {
  bool emitted = false;
  int64_t height = 28;
  int64_t vectors = 1;
  int64_t chunk = 0;  // emitted: blocks per pass over all rows; 0: all
  int64_t deep = 1;   // templates, batch innermost: rows of pixels per block; `vectors` is of all
  int64_t depth = 0;  // channels of x per stage, see EmitTile; 0: all
};

// What a sparse convolution step is made of: entry i of row r reads x at offsets[i].
struct RowsSpec {
  Place x, y, residual;
  bool has_residual = false;
  std::vector<int32_t> indptr, offsets;
  std::vector<float> values, bias;
  Activation activation = kNone;
  bool relu_in = false;  // on x, emitted code only
  RowsKernel kernel;
};
StepPtr make_rows(RowsSpec spec);

struct DepthwiseSpec {
  Place x, y;
  int64_t kernel, stride_h, stride_w, top, left, dilation_h, dilation_w;
  std::vector<float> weights, bias;
  Activation activation;
  bool emitted = false;  // whether code may be made for it
  bool relu_in = false;  // on x, emitted code only
};
StepPtr make_depthwise(DepthwiseSpec spec);

// A 1x1 convolution (or none), a depthwise one, a 1x1 one (or none), `strip` output rows at a time.
// The places between them are scratch: expand.y and depthwise.x hold the rows of one strip of one tile
// of channels, depthwise.y and project.x those of one strip, if there is a project.
struct FusedSpec {
  bool has_expand, has_project;
  RowsSpec expand;
  DepthwiseSpec depthwise;
  RowsSpec project;
  int64_t strip;
};
StepPtr make_fused(FusedSpec spec);

struct PoolSpec {
  Place x, y;
  bool maximum, count_padding;
  int64_t kernel_h, kernel_w, stride_h, stride_w, top, left, bottom, right, dilation_h, dilation_w;
  std::vector<float> scale, bias;  // empty: none
  Activation activation;
  Place residual;  // emitted code only, as relu_in
  bool has_residual = false, relu_in = false;
};
StepPtr make_pool(PoolSpec spec);

// y[c] = act(scale * (x[sources[c]] taken from (shift_h, shift_w) every stride-th pixel, combined) + bias)
struct MapSpec {
  Place x, other, y;
  Combine combine = kCopy;
  std::vector<int32_t> channels;  // of x for each of y; empty: the same
  std::vector<int32_t> shift_h, shift_w;
  int64_t stride_h = 1, stride_w = 1;
  std::vector<float> scale, bias;
  Activation activation = kNone;
};
StepPtr make_map(MapSpec spec);

StepPtr make_mean(Place x, Place y);

struct GemvSpec {
  Place x, y;
  std::vector<float> weights, bias;  // [outputs, inputs]
  Activation activation;
  bool sparse;  // as a bit mask and values
};
StepPtr make_gemv(GemvSpec spec);

// Between tensors [images, C, H, W] of the call and pictures with the batch innermost.
StepPtr make_gather(Place x, Place y);
StepPtr make_scatter(Place x, Place y);

}  // namespace dass
