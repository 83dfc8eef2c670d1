// The kernels of compiled networks' dense steps, against plain loops in double.
#include <memory>

#include "checks.h"

namespace checks {
namespace {

using dass::Activation;
using dass::PlanesOut;

constexpr int64_t kChannels = 2;
constexpr int64_t kSlack = 128;  // kernels load whole registers, of as many pixels as a stride spans

// A picture: element (c, y, x) of image `lane`. What is no pixel is NaN; so is what lies behind it, which
// is `slack` floats that may be read.
struct Planes {
  int64_t rows, columns, pixel, pitch, channel;
  std::unique_ptr<Guarded<float>> data;

  Planes(int64_t r, int64_t c, int64_t p, int64_t slack, Random& random)
      : rows(r), columns(c), pixel(p), pitch(c * p + p * random.below(4)), channel(r * pitch + random.below(9)) {
    data = std::make_unique<Guarded<float>>((kChannels - 1) * channel + (rows - 1) * pitch + columns * pixel + slack);
    for (int64_t i = 0; i < kChannels; ++i)
      for (int64_t y = 0; y < rows; ++y)
        for (int64_t x = 0; x < columns * pixel; ++x) (*data)[at(i, y, x)] = 3 * random.number<float>();
  }
  // x in floats.
  int64_t at(int64_t c, int64_t y, int64_t x) const { return c * channel + y * pitch + x; }
  float operator()(int64_t c, int64_t y, int64_t x) const { return (*data)[at(c, y, x)]; }
  dass::Picture picture() const { return {data->data(), channel, pitch}; }
};

// Outputs with zeros behind each row and, perhaps, more that may not be touched.
struct Outputs {
  PlanesOut out;
  Guarded<float> data;

  Outputs(int64_t rows, int64_t columns, int64_t pixel, Random& random)
      : Outputs(geometry(rows, columns, pixel, random)) {}

  // Compares all of them; want(channel, row, float of the row) is a Sum.
  template <class Want>
  void check(Activation activation, Want want) {
    data.check("the output");
    std::vector<bool> written(data.size());
    const int64_t floats = out.columns * out.pixel;
    for (int64_t c = 0; c < out.channels; ++c)
      for (int64_t row = 0; row < out.rows; ++row)
        for (int64_t x = 0; x < floats + out.zeros; ++x) {
          const int64_t at = c * out.channel + row * out.pitch + x;
          written[at] = true;
          if (x >= floats) {
            expect(data[at], 0, 0, "zero", at);
            continue;
          }
          const Sum sum = want(c, row, x);
          expect(data[at], activated(sum.value, activation), forward_bound<float>(sum, activation), "output", at);
        }
    for (int64_t i = 0; i < data.size(); ++i)
      if (!written[i]) expect_untouched(data[i], "output", i);
  }

 private:
  explicit Outputs(PlanesOut o)
      : out(o), data((o.channels - 1) * o.channel + (o.rows - 1) * o.pitch + o.columns * o.pixel + o.zeros) {
    out.data = data.data();
  }
  static PlanesOut geometry(int64_t rows, int64_t columns, int64_t pixel, Random& random) {
    const int64_t zeros = random.below(2) * random.below(40) * pixel, floats = columns * pixel;
    const int64_t pitch = floats + zeros + random.below(3) * pixel;
    return {nullptr, rows * pitch + random.below(9), pitch, kChannels, rows, columns, pixel, zeros};
  }
};

// Per channel, or null.
struct Factors {
  Guarded<float> values{kChannels};
  bool given;
  explicit Factors(Random& random) : given(random.below(2) == 0) { values.fill(random); }
  const float* data() const { return given ? values.data() : nullptr; }
  double of(int64_t c, double otherwise) const { return given ? values[c] : otherwise; }
};

struct Window {
  int64_t kernel, stride_h, stride_w, dilation;
};

void check_depthwise_case(void (*kernel)(const dass::DepthwiseArgs&), const Window& w, int64_t rows, int64_t columns,
                          int64_t pixel, Activation activation, Random& random) {
  const int64_t k = w.kernel, span = (k - 1) * w.dilation + 1;
  Planes x((rows - 1) * w.stride_h + span, (columns - 1) * w.stride_w + span, pixel, kSlack * pixel, random);
  Guarded<float> weights(kChannels * k * k), bias(kChannels);
  weights.fill(random);
  bias.fill(random);
  Outputs y(rows, columns, pixel, random);
  kernel({x.picture(), y.out, weights.data(), bias.data(), w.dilation * x.pitch, w.dilation * pixel,
          w.stride_h * x.pitch, w.stride_w, activation});
  y.check(activation, [&](int64_t c, int64_t row, int64_t at) {
    Sum sum;
    sum.add(bias[c]);
    const int64_t lane = at % pixel, column = at / pixel;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < k; ++j)
        sum.add(weights[(c * k + i) * k + j],
                x(c, row * w.stride_h + i * w.dilation, (column * w.stride_w + j * w.dilation) * pixel + lane));
    return sum;
  });
}

void check_depthwise(const dass::KernelTable& table, int slot) {
  const int64_t kernel = 2 * slot + 3, lanes = table.f32.lanes;
  Random random(kernel);
  int turn = 0;
  for (const int64_t pixel : {int64_t{1}, lanes})
    for (const Window& w :
         {Window{kernel, 1, 1, 1}, Window{kernel, 2, 2, 1}, Window{kernel, 1, 2, 1}, Window{kernel, 2, 1, 1},
          Window{kernel, 1, 1, 2}, Window{kernel, 2, 2, 2}, Window{kernel, 3, 3, 1}, Window{kernel, 2, 2, 3}}) {
      if (pixel == 1 && w.stride_w > 2) continue;
      for (const int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 14, 15})
        for (const int64_t columns : {int64_t{1}, lanes - 1, lanes, lanes + 1, 2 * lanes + 3})
          check_depthwise_case(table.dense->depthwise[slot], w, rows, columns, pixel,
                               static_cast<Activation>(turn++ % 4), random);
    }
}

// The pixels of a window: use(row, column) for those inside the picture.
template <class Use>
void visit(const dass::PoolArgs& a, int64_t row, int64_t column, Use use) {
  for (int64_t i = 0; i < a.kernel_h; ++i)
    for (int64_t j = 0; j < a.kernel_w; ++j) {
      const int64_t y = row * a.stride_h - a.top + i * a.dilation_h,
                    x = column * a.stride_w - a.left + j * a.dilation_w;
      if (y >= 0 && y < a.in_rows && x >= 0 && x < a.in_columns) use(y, x);
    }
}

void check_pool_case(void (*kernel)(const dass::PoolArgs&), int64_t rows, int64_t columns, int64_t pixel, int64_t lanes,
                     float special, Random& random) {
  dass::PoolArgs a{};
  a.kernel_h = 1 + random.below(4);
  a.kernel_w = 1 + random.below(4);
  a.stride_h = 1 + random.below(3);
  a.stride_w = 1 + random.below(4);
  a.dilation_h = 1 + random.below(2);
  a.dilation_w = 1 + random.below(3);
  a.top = random.below(a.kernel_h);
  a.left = random.below(a.kernel_w);
  // Windows may hang over on the other sides, too: each has its first pixels at least.
  const int64_t span_h = (rows - 1) * a.stride_h, span_w = (columns - 1) * a.stride_w;
  a.in_rows = span_h + 1 + random.below((a.kernel_h - 1) * a.dilation_h + 1);
  a.in_columns = span_w + 1 + random.below((a.kernel_w - 1) * a.dilation_w + 1);
  a.maximum = random.below(2) == 0;
  a.activation = static_cast<Activation>(random.below(7));
  Planes x(a.in_rows, a.in_columns, pixel, lanes, random);
  if (special != 0) (*x.data)[x.at(1, a.in_rows / 2, a.in_columns / 2 * pixel)] = special;
  Guarded<float> by_row(rows), by_column(columns * pixel + lanes),
      scratch(((columns + lanes) * a.stride_w + a.left + a.in_columns + a.kernel_w * a.dilation_w) * pixel + 4 * lanes);
  by_row.fill(random);
  by_column.fill(random);
  for (int64_t i = 0; i < columns * pixel; ++i) by_column[i] = by_column[i / pixel * pixel];
  const Factors scale(random), bias(random);
  Outputs y(rows, columns, pixel, random);
  a.x = x.picture();
  a.y = y.out;
  a.by_row = by_row.data();
  a.by_column = by_column.data();
  a.scale = scale.data();
  a.bias = bias.data();
  a.scratch = scratch.data();
  a.scratch_floats = scratch.size();
  kernel(a);
  scratch.check("the scratch memory");
  y.check(a.activation, [&](int64_t c, int64_t row, int64_t at) {
    Sum sum;
    double most = -std::numeric_limits<double>::infinity();
    const double share = a.maximum ? 0 : static_cast<double>(by_row[row]) * by_column[at];
    visit(a, row, at / pixel, [&](int64_t i, int64_t j) {
      const double v = x(c, i, j * pixel + at % pixel);
      if (!a.maximum) sum.add(v * share, scale.of(c, 1));
      most = std::isnan(v) || std::isnan(most) ? std::nan("") : std::max(most, v);
    });
    if (a.maximum) sum.add(most, scale.of(c, 1));
    sum.length += 4;
    sum.add(bias.of(c, 0));
    return sum;
  });
}

void check_pool(const dass::KernelTable& table) {
  Random random(1);
  const int64_t lanes = table.f32.lanes;
  for (const int64_t pixel : {int64_t{1}, lanes})
    for (const int64_t rows : {1, 2, 5})
      for (const int64_t columns : {int64_t{1}, lanes - 1, lanes, lanes + 1, 2 * lanes + 3})
        for (int i = 0; i < 40; ++i) {
          const float specials[] = {0, 0, poison<float>(), std::numeric_limits<float>::infinity()};
          check_pool_case(table.dense->pool, rows, columns, pixel, lanes, specials[i % 4], random);
        }
}

void check_map_case(void (*kernel)(const dass::MapArgs&), int64_t columns, int64_t pixel, Activation activation,
                    dass::Combine combine, int64_t stride, Random& random) {
  const int64_t rows = 1 + random.below(4);
  dass::MapArgs a{};
  a.stride = stride;
  a.combine = combine;
  a.activation = activation;
  // Only plain copies end early.
  const bool early = combine == dass::kCopy && activation == dass::kNone;
  a.in_rows = early ? random.below(rows + 1) : rows;
  a.in_columns = early ? random.below(columns + 1) : columns;
  // Nothing past the last pixel is read of x.
  const int64_t wide = std::max<int64_t>(1, (a.in_columns - 1) * stride + 1);
  Planes x(std::max<int64_t>(1, a.in_rows), wide, pixel, 0, random);
  const bool channels = combine == dass::kMulChannel;
  Planes other(channels ? 1 : rows, channels ? 1 : columns, pixel, 16, random);
  const Factors scale(random), bias(random);
  Outputs y(rows, columns, pixel, random);
  a.x = x.picture();
  a.other = other.picture();
  if (channels) a.other.pitch = 0;
  a.y = y.out;
  a.scale = scale.data();
  a.bias = early ? nullptr : bias.data();
  kernel(a);
  y.check(activation, [&](int64_t c, int64_t row, int64_t at) {
    Sum sum;
    const int64_t column = at / pixel, lane = at % pixel;
    const bool inside = row < a.in_rows && column < a.in_columns;
    double v = inside ? x(c, row, column * stride * pixel + lane) : 0;
    double size = std::fabs(v);
    if (combine == dass::kAdd) size += std::fabs(other(c, row, at)), v += other(c, row, at);
    if (combine == dass::kMul) size *= std::fabs(other(c, row, at)), v *= other(c, row, at);
    if (channels) size *= std::fabs(other(c, 0, lane)), v *= other(c, 0, lane);
    sum.add(v * scale.of(c, 1));
    sum.magnitude = size * std::fabs(scale.of(c, 1));
    sum.length = 2;
    if (!early) sum.add(bias.of(c, 0));
    return sum;
  });
}

void check_map(const dass::KernelTable& table) {
  Random random(1);
  const int64_t lanes = table.f32.lanes;
  for (const int64_t pixel : {int64_t{1}, lanes})
    for (const int64_t columns : {int64_t{1}, lanes - 1, lanes, lanes + 1, 2 * lanes + 3})
      for (int activation = 0; activation < 7; ++activation)
        for (const auto combine : {dass::kCopy, dass::kAdd, dass::kMul, dass::kMulChannel})
          for (int64_t stride = 1; stride < 4; ++stride)
            check_map_case(table.dense->map, columns, pixel, static_cast<Activation>(activation), combine, stride,
                           random);
}

void check_mean(const dass::KernelTable& table) {
  Random random(1);
  const int64_t lanes = table.f32.lanes;
  for (const int64_t pixel : {int64_t{1}, lanes})
    for (int64_t rows = 1; rows < 6; ++rows)
      for (int64_t columns = 1; columns < 2 * lanes + 4; ++columns) {
        Planes x(rows, columns, pixel, lanes, random);
        Guarded<float> y(kChannels * pixel);
        table.dense->mean({x.picture(), y.data(), kChannels, rows, columns, pixel});
        y.check("the means");
        for (int64_t i = 0; i < y.size(); ++i) {
          Sum sum;
          for (int64_t row = 0; row < rows; ++row)
            for (int64_t c = 0; c < columns; ++c)
              sum.add(x(i / pixel, row, c * pixel + i % pixel), 1.0 / static_cast<double>(rows * columns));
          expect(y[i], sum.value, sum.bound<float>(), "mean", i);
        }
      }
}

void check_gemv(const dass::KernelTable& table) {
  Random random(1);
  const int64_t lanes = table.f32.lanes;
  for (int64_t rows = 1; rows < 12; ++rows)
    for (const int64_t columns : {int64_t{1}, lanes - 1, lanes, lanes + 1, 5 * lanes + 3})
      for (int turn = 0; turn < 7; ++turn) {
        Guarded<float> x(columns), w(rows * columns), bias(rows), y(rows);
        x.fill(random);
        w.fill(random);
        bias.fill(random);
        const int64_t begin = rows > 2 ? 1 : 0;
        const auto activation = static_cast<Activation>(turn);
        table.dense->gemv({x.data(), w.data(), bias.data(), y.data(), begin, rows, columns, activation});
        y.check("the output");
        for (int64_t r = 0; r < rows; ++r) {
          if (r < begin) {
            expect_untouched(y[r], "output", r);
            continue;
          }
          Sum sum;
          sum.add(bias[r]);
          for (int64_t k = 0; k < columns; ++k) sum.add(w[r * columns + k], x[k]);
          expect(y[r], activated(sum.value, activation), forward_bound<float>(sum, activation), "output", r);
        }
      }
}

}  // namespace

int64_t check_dense(const dass::KernelTable& table) {
  const std::string isa = table.isa;
  int64_t done = 0;
  for (int slot = 0; slot < 3; ++slot, ++done) {
    current() = isa + " depthwise " + std::to_string(2 * slot + 3);
    check_depthwise(table, slot);
  }
  const std::pair<const char*, void (*)(const dass::KernelTable&)> families[] = {
      {"pool", check_pool}, {"map", check_map}, {"mean", check_mean}, {"dense gemv", check_gemv}};
  for (const auto& [name, check] : families) {
    current() = isa + " " + name;
    check(table);
    ++done;
  }
  return done;
}

}  // namespace checks
