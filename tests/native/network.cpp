// A whole network as a program, in both layouts: convolution, depthwise, pool, mean, matrix.
#include "checks.h"
#include "cpu/isa.h"
#include "program/program.h"

namespace checks {
namespace {

using dass::Place;

constexpr int64_t kIn = 4, kMiddle = 6, kOut = 5, kRows = 9, kColumns = 11;
constexpr int64_t kBatch = 3;

// A value in double, and how far from it a float may be.
struct Value {
  double v = 0, error = 0;
};

// [channels, rows, columns] of one image.
struct Image {
  int64_t channels, rows, columns;
  std::vector<Value> values;
  Image(int64_t c, int64_t h, int64_t w) : channels(c), rows(h), columns(w), values(c * h * w) {}
  Value& at(int64_t c, int64_t y, int64_t x) { return values[(c * rows + y) * columns + x]; }
  // Zeros outside.
  Value around(int64_t c, int64_t y, int64_t x) const {
    const bool inside = y >= 0 && y < rows && x >= 0 && x < columns;
    return inside ? values[(c * rows + y) * columns + x] : Value{};
  }
};

struct Weights {
  std::vector<float> conv, conv_bias, depthwise, depthwise_bias, matrix, matrix_bias;
};

std::vector<float> numbers(int64_t count, double density, Random& random) {
  std::vector<float> found(count);
  for (float& f : found)
    if (static_cast<double>(random.below(1000)) < 1000 * density) f = random.number<float>();
  return found;
}

// A sum of products with values that are uncertain themselves.
struct Product {
  Sum sum;
  double carried = 0;
  void add(double w, Value x) {
    sum.add(w, x.v);
    carried += std::fabs(w) * x.error;
    sum.magnitude += std::fabs(w) * x.error;
  }
  Value activated(double bias, dass::Activation a) {
    sum.add(bias);
    const double slope = a == dass::kHardswish ? 1.5 : 1;
    return {checks::activated(sum.value, a), forward_bound<float>(sum, a) + slope * carried};
  }
};

// What the network is, plainly.
std::vector<Value> expected(const Weights& w, const Image& x) {
  Image a(kMiddle, kRows, kColumns), b(kMiddle, 5, 6), c(kMiddle, 3, 3);
  std::vector<Value> means(kMiddle), out(kOut);
  for (int64_t o = 0; o < kMiddle; ++o)
    for (int64_t row = 0; row < a.rows; ++row)
      for (int64_t column = 0; column < a.columns; ++column) {
        Product p;
        for (int64_t i = 0; i < kIn * 9; ++i)
          if (const float f = w.conv[o * kIn * 9 + i])
            p.add(f, x.around(i / 9, row + i / 3 % 3 - 1, column + i % 3 - 1));
        a.at(o, row, column) = p.activated(w.conv_bias[o], dass::kRelu);
      }
  for (int64_t o = 0; o < kMiddle; ++o)
    for (int64_t row = 0; row < b.rows; ++row)
      for (int64_t column = 0; column < b.columns; ++column) {
        Product p;
        for (int64_t i = 0; i < 25; ++i)
          p.add(w.depthwise[o * 25 + i], a.around(o, 2 * row + i / 5 - 2, 2 * column + i % 5 - 2));
        b.at(o, row, column) = p.activated(w.depthwise_bias[o], dass::kRelu6);
      }
  for (int64_t o = 0; o < kMiddle; ++o) {
    Product mean;
    for (int64_t row = 0; row < 3; ++row)
      for (int64_t column = 0; column < 3; ++column) {
        Value most;  // what comes out of relu6 is no less than the zeros around
        for (int64_t i = 0; i < 9; ++i) {
          const Value v = b.around(o, 2 * row + i / 3 - 1, 2 * column + i % 3 - 1);
          most = {std::max(most.v, v.v), std::max(most.error, v.error)};
        }
        mean.add(1.0 / 9, most);
      }
    means[o] = mean.activated(0, dass::kNone);
  }
  for (int64_t o = 0; o < kOut; ++o) {
    Product p;
    for (int64_t i = 0; i < kMiddle; ++i) p.add(w.matrix[o * kMiddle + i], means[i]);
    out[o] = p.activated(w.matrix_bias[o], dass::kHardswish);
  }
  return out;
}

// Places one after the other in the arena.
class Builder {
 public:
  explicit Builder(int64_t pixel) : pixel_(pixel) {}
  Place picture(int64_t channels, int64_t rows, int64_t columns, int64_t pad) {
    const auto lines = [](int64_t floats) { return (floats + 15) / 16 * 16; };
    const int64_t pitch = columns + pad, channel = lines(((rows + pad) * pitch + 16) * pixel_);
    const int64_t at = arena_ + lines((pad * pitch + pad) * pixel_);
    arena_ = at + channels * channel;
    return {0, at, channels, rows, columns, channel, pitch, pad, pixel_};
  }
  Place vector(int64_t length) {
    const int64_t at = arena_;
    arena_ += (length * pixel_ + 15) / 16 * 16;
    return {0, at, length, 1, 1, pixel_, 1, 0, pixel_};
  }
  Place row(Place vector) const {
    return {0, vector.offset, 1, 1, vector.channels, vector.channels * pixel_, vector.channels, 0, pixel_};
  }
  int64_t arena() const { return arena_; }

 private:
  int64_t pixel_, arena_ = 0;
};

Place tensor(int64_t space, int64_t channels, int64_t rows, int64_t columns) {
  return {space, 0, channels, rows, columns, rows * columns, columns, 0, 1};
}

dass::StepPtr copy(Place x, Place y) {
  dass::MapSpec s;
  s.x = x;
  s.y = y;
  return dass::make_map(s);
}

// All of the arena becomes NaN: the sum of nothing and of such a bias.
dass::StepPtr make_poison(int64_t arena) {
  dass::MapSpec s;
  s.x = tensor(1, 1, 1, 0);
  s.y = tensor(0, 1, 1, arena);
  s.bias = {poison<float>()};
  return dass::make_map(s);
}

// entry(row, i): the weight of a row's i-th column, and where that lies.
dass::RowsSpec rows(Place x, Place y, const std::vector<float>& weights, const std::vector<float>& bias,
                    const std::vector<int64_t>& places, dass::Activation activation) {
  dass::RowsSpec s;
  s.x = x;
  s.y = y;
  s.bias = bias;
  s.activation = activation;
  s.kernel = {true, 4, 2, 0};
  s.indptr.push_back(0);
  const int64_t columns = static_cast<int64_t>(places.size());
  for (int64_t i = 0; i < static_cast<int64_t>(weights.size()); ++i) {
    if (weights[i] != 0) {
      s.values.push_back(weights[i]);
      s.offsets.push_back(static_cast<int32_t>(places[i % columns]));
    }
    if ((i + 1) % columns == 0) s.indptr.push_back(static_cast<int32_t>(s.values.size()));
  }
  return s;
}

dass::Program make_network(const Weights& w, int64_t pixel) {
  Builder build(pixel);
  const Place x = build.picture(kIn, kRows, kColumns, 2), a = build.picture(kMiddle, kRows, kColumns, 2);
  const Place b = build.picture(kMiddle, 5, 6, 0), c = build.picture(kMiddle, 3, 3, 0);
  const Place means = build.vector(kMiddle), out = build.vector(kOut);
  std::vector<int64_t> taps, inputs;
  for (int64_t i = 0; i < kIn * 9; ++i)
    taps.push_back(i / 9 * x.channel + ((i / 3 % 3 - 1) * x.pitch + i % 3 - 1) * pixel);
  for (int64_t i = 0; i < kMiddle; ++i) inputs.push_back(i * pixel);
  const Place input = tensor(1, kIn, kRows, kColumns), output = tensor(2, 1, 1, kOut);
  std::vector<dass::StepPtr> steps;
  steps.push_back(make_poison(build.arena()));
  steps.push_back(pixel > 1 ? dass::make_gather(input, x) : copy(input, x));
  steps.push_back(dass::make_rows(rows(x, a, w.conv, w.conv_bias, taps, dass::kRelu)));
  steps.push_back(dass::make_depthwise({a, b, 5, 2, 2, 2, 2, 1, 1, w.depthwise, w.depthwise_bias, dass::kRelu6, true}));
  steps.push_back(dass::make_pool({b, c, true, true, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, {}, {}, dass::kNone}));
  steps.push_back(dass::make_mean(c, means));
  steps.push_back(pixel > 1 ? dass::make_rows(rows(means, out, w.matrix, w.matrix_bias, inputs, dass::kHardswish))
                            : dass::make_gemv({means, out, w.matrix, w.matrix_bias, dass::kHardswish, false}));
  steps.push_back(pixel > 1 ? dass::make_scatter(build.row(out), output) : copy(build.row(out), output));
  return {pixel, build.arena(), {kIn * kRows * kColumns, kOut}, std::move(steps)};
}

// As if one thread had been late: it finds nothing left to do.
void in_turn(int64_t count, const std::function<void(int64_t, int64_t)>& work) {
  for (int64_t i = 0; i < count; ++i) work(i, i + 1);
}

}  // namespace

void check_program(const std::string& isa) {
  Random random(1);
  const Weights w{numbers(kMiddle * kIn * 9, 0.4, random), numbers(kMiddle, 1, random),
                  numbers(kMiddle * 25, 1, random),        numbers(kMiddle, 1, random),
                  numbers(kOut * kMiddle, 1, random),      numbers(kOut, 1, random)};
  Guarded<float> x(kBatch * kIn * kRows * kColumns);
  x.fill(random);
  for (const int64_t pixel : {int64_t{1}, int64_t{dass::table_named(isa).f32.lanes}})
    for (const int64_t threads : {1, 2, 3, 5}) {
      current() = isa + " network, " + std::to_string(pixel) + " side by side, " + std::to_string(threads) + " threads";
      Guarded<float> y(kBatch * kOut);
      make_network(w, pixel).run({x.data(), y.data()}, kBatch, threads, in_turn);
      y.check("the output");
      for (int64_t image = 0; image < kBatch; ++image) {
        Image in(kIn, kRows, kColumns);
        for (size_t i = 0; i < in.values.size(); ++i) in.values[i].v = x[image * in.values.size() + i];
        const std::vector<Value> want = expected(w, in);
        for (int64_t o = 0; o < kOut; ++o)
          expect(y[image * kOut + o], want[o].v, want[o].error, "output", image * kOut + o);
      }
    }
}

}  // namespace checks
