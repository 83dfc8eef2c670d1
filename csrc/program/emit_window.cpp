// Machine code for what goes over planes channel by channel: depthwise convolutions, pooling, copies.
// Every distance is a constant of the code, the weights of a channel stay in registers, and several rows
// share what they read.
#include <algorithm>
#include <cstddef>
#include <utility>

#include "emit.h"
#include "step.h"

#ifdef DASS_XBYAK
#define XBYAK_NO_OP_NAMES
#include <xbyak/xbyak.h>
#endif

namespace dass {

#ifdef DASS_XBYAK
namespace {

using Fn = void (*)(const WindowArgs*);
constexpr int kLanes = 16;

class Emitter : public Xbyak::CodeGenerator {
 public:
  explicit Emitter(const EmitWindow& g) : CodeGenerator(size_t{1} << 20, Xbyak::DontSetProtectRWE), g_(g) {
    vectors_ = static_cast<int>((g.columns + kLanes - 1) / kLanes);
    // 9 weights leave room for the sums of 7 or 8 rows, 25 for those of two.
    in_registers_ = g.op == kWeighted && taps() > 1 && (taps() <= 9 || (taps() <= 25 && g.stride == 1));
    int next = in_registers_ ? taps() : 0;
    bias_ = g.op == kWeighted && taps() > 1 ? next++ : -1;
    zero_ = g.activation != kNone || g.relu_in ? next++ : -1;
    six_ = g.activation == kRelu6 ? next++ : -1;
    lowest_ = g.op == kMaximum ? next++ : -1;
    if (g.stride == 2) even_ = next++, odd_ = next++;
    sums_ = next;
    shifts_ = g.stride == 1 && g.kernel_w == 3 && g.tap_column == 1 && !g.exact;
    const int fetched = g.stride == 2 ? static_cast<int>(g.kernel_w) + 2 : shifts_ ? 4 : 3;
    const bool together = g.stride_row == g.stride * g.tap_row || g.kernel_h == 1;
    const int wanted = taps() == 9 && g.rows % 7 == 0 ? 7 : 8;
    const int rows = std::min({wanted, 32 - sums_ - fetched, static_cast<int>(g.rows)});
    generate(together ? rows : 1);
    setProtectModeRE();
  }
  void run(const WindowArgs& args) const {
    if (args.channels) getCode<Fn>()(&args);
  }

 private:
  int taps() const { return static_cast<int>(g_.kernel_h * g_.kernel_w); }
  int down() const { return g_.kernel_h == 1 ? 1 : static_cast<int>(g_.stride_row / g_.tap_row); }
  // Distance of the input rows that a group of output rows goes through.
  int64_t row_step() const { return g_.kernel_h == 1 ? g_.stride_row : g_.tap_row; }
  Xbyak::Zmm zmm(int i) const { return Xbyak::Zmm(i); }
  Xbyak::Address at(const Xbyak::Reg64& base, int64_t floats) { return ptr[base + static_cast<int>(floats * 4)]; }
  void argument(const Xbyak::Reg64& to, size_t which) { mov(to, ptr[rdi + which]); }

  void generate(int rows) {
    Xbyak::Label channel;
    for (const auto& reg : {rbx, r12, r13, r14}) push(reg);
    argument(rsi, offsetof(WindowArgs, y));
    argument(rdx, offsetof(WindowArgs, weights));
    argument(rcx, offsetof(WindowArgs, channels));
    argument(r12, offsetof(WindowArgs, offsets));
    argument(r13, offsetof(WindowArgs, residual));
    constants();
    L(channel);
    if (in_registers_)
      for (int k = 0; k < taps(); ++k) vbroadcastss(zmm(k), at(rdx, k));
    if (bias_ >= 0) vbroadcastss(zmm(bias_), at(rdx, taps()));
    movsxd(rax, dword[r12]);
    argument(r8, offsetof(WindowArgs, x));
    lea(r8, ptr[r8 + rax * 4]);
    mov(r9, rsi);
    mov(r11, r13);
    argument(r14, offsetof(WindowArgs, shares));
    groups(rows);
    add(r12, sizeof(int32_t));
    add(rsi, static_cast<int>(g_.y_channel * 4));
    if (g_.residual) add(r13, static_cast<int>(g_.residual_channel * 4));
    if (g_.weights) add(rdx, g_.weights * 4);
    dec(rcx);
    jnz(channel, T_NEAR);
    for (const auto& reg : {r14, r13, r12, rbx}) pop(reg);
    vzeroupper();
    ret();
    if (g_.stride == 2) indices();
  }

  void constants() {
    if (zero_ >= 0) vpxord(zmm(zero_), zmm(zero_), zmm(zero_));
    if (six_ >= 0) broadcast(six_, 0x40c00000);
    if (lowest_ >= 0) broadcast(lowest_, 0xff800000);
    if (g_.stride == 2) {
      lea(rax, ptr[rip + table_]);
      vmovups(zmm(even_), ptr[rax]);
      vmovups(zmm(odd_), ptr[rax + 64]);
    }
    // k1: the pixels of a row's last register, k2: those and the zeros behind them, k3: further zeros.
    const int64_t whole = static_cast<int64_t>(vectors_) * kLanes, all = g_.columns + g_.zeros;
    set_mask(k1, ones(g_.columns - (vectors_ - 1) * kLanes));
    set_mask(k2, ones(std::min<int64_t>(kLanes, all - (vectors_ - 1) * kLanes)));
    if (all > whole) set_mask(k3, ones((all - whole - 1) % kLanes + 1));
    keep_border_masks();
  }
  void broadcast(int reg, uint32_t bits) {
    mov(eax, bits);
    vpbroadcastd(zmm(reg), eax);
  }
  static uint32_t ones(int64_t lanes) { return static_cast<uint32_t>((uint64_t{1} << lanes) - 1); }
  void set_mask(const Xbyak::Opmask& k, uint32_t mask) {
    mov(eax, mask);
    kmovw(k, eax);
  }

  // Groups of rows; those whose windows lie inside the picture share their code.
  void groups(int rows) {
    int64_t row = 0;
    while (row < g_.rows) {
      const int count = static_cast<int>(std::min<int64_t>(rows, g_.rows - row));
      int64_t same = 0;
      while (count == rows && row + (same + 1) * rows <= g_.rows && inside(row + same * rows, rows)) ++same;
      if (same > 1) {
        Xbyak::Label group;
        mov(r10, same);
        L(group);
        some_rows(rows, row);
        advance(rows);
        dec(r10);
        jnz(group, T_NEAR);
        row += same * rows;
      } else {
        some_rows(count, row);
        row += count;
        if (row < g_.rows) advance(count);
      }
    }
  }
  bool inside(int64_t row, int rows) const {
    if (!g_.in_rows) return true;
    const int64_t first = row * g_.stride_h - g_.top;
    const int64_t last = (row + rows - 1) * g_.stride_h - g_.top + (g_.kernel_h - 1) * g_.dilation_h;
    return first >= 0 && last < g_.in_rows;
  }
  void advance(int rows) {
    add(r8, static_cast<int>(rows * g_.stride_row * 4));
    add(r9, static_cast<int>(rows * g_.pitch * 4));
    if (g_.residual) add(r11, static_cast<int>(rows * g_.residual_pitch * 4));
    if (g_.op == kMean) add(r14, rows * vectors_ * kLanes * 4);
  }

  void some_rows(int rows, int64_t row) {
    for (int v = 0; v < vectors_; ++v) {
      for (int r = 0; r < rows; ++r) begin(r);
      const int reach = static_cast<int>(g_.kernel_h) + (rows - 1) * down();
      for (int i = 0; i < reach; ++i) {
        if (!needed(i, rows, row)) continue;
        const int64_t from = i * row_step() + static_cast<int64_t>(v) * kLanes * g_.stride;
        if (g_.stride == 1)
          side_by_side(rows, row, i, v, from);
        else
          every_other(rows, row, i, v, from);
      }
      for (int r = 0; r < rows; ++r) finish(r, v);
    }
    const int64_t all = g_.columns + g_.zeros, whole = static_cast<int64_t>(vectors_) * kLanes;
    if (all > whole) {
      const Xbyak::Zmm nothing = zmm(sums_);
      vpxord(nothing, nothing, nothing);
      for (int r = 0; r < rows; ++r)
        for (int64_t from = whole; from < all; from += kLanes) {
          const Xbyak::Address y = at(r9, r * g_.pitch + from);
          if (from + kLanes <= all)
            vmovups(y, nothing);
          else
            vmovups(y | k3, nothing);
        }
    }
  }

  void begin(int r) {
    if (bias_ >= 0)
      vmovaps(zmm(sums_ + r), zmm(bias_));
    else if (g_.op == kMaximum)
      vmovaps(zmm(sums_ + r), zmm(lowest_));
    else
      vpxord(zmm(sums_ + r), zmm(sums_ + r), zmm(sums_ + r));
  }

  // Which tap of output row r input row i of the group is, or -1.
  int tap(int i, int r, int64_t row) const {
    const int k = i - r * down();
    if (k < 0 || k >= g_.kernel_h) return -1;
    if (!g_.in_rows) return k;
    const int64_t in = (row + r) * g_.stride_h - g_.top + k * g_.dilation_h;
    return in >= 0 && in < g_.in_rows ? k : -1;
  }
  bool needed(int i, int rows, int64_t row) const {
    for (int r = 0; r < rows; ++r)
      if (tap(i, r, row) >= 0) return true;
    return false;
  }

  // A pool's windows are as good row by row: the taps of a row become one first.
  void combine(int k, const Xbyak::Zmm& in) {
    if (g_.relu_in && !shifts_) vmaxps(in, zmm(zero_), in);
    if (k == 0)
      combined_ = in.getIdx();
    else if (g_.op == kMaximum)
      larger(zmm(combined_), in);
    else
      vaddps(zmm(combined_), zmm(combined_), in);
  }

  // vmaxps takes its second source when either is NaN: where the first one is, it stays.
  void larger(const Xbyak::Zmm& sum, const Xbyak::Zmm& in) {
    constexpr int kOrdered = 7;
    vcmpps(k4, sum, sum, kOrdered);
    vmaxps(sum | k4, sum, in);
  }

  void accumulate(int rows, int64_t row, int i, int k, const Xbyak::Zmm& tap_in) {
    if (g_.op != kWeighted) {
      combine(k, tap_in);
      if (k + 1 < g_.kernel_w) return;
    } else if (g_.relu_in && !shifts_) {
      vmaxps(tap_in, zmm(zero_), tap_in);
    }
    const Xbyak::Zmm in = g_.op == kWeighted ? tap_in : zmm(combined_);
    for (int r = 0; r < rows; ++r) {
      const int down = tap(i, r, row);
      if (down < 0) continue;
      const Xbyak::Zmm sum = zmm(sums_ + r);
      const int w = down * static_cast<int>(g_.kernel_w) + k;
      if (g_.op == kMaximum)
        larger(sum, in);
      else if (g_.op == kMean)
        vaddps(sum, sum, in);
      else if (taps() == 1)
        vmovaps(sum, in);
      else if (in_registers_)
        vfmadd231ps(sum, in, zmm(w));
      else
        vfmadd231ps(sum, in, ptr_b[rdx + 4 * w]);
    }
  }

  // The lanes of a register whose column `first`, `first` + stride, ... is in the picture.
  uint32_t lanes_inside(int64_t first, int64_t stride) const {
    uint32_t mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t column = first + lane * stride;
      if (column >= 0 && column < g_.in_columns) mask |= 1u << lane;
    }
    return mask;
  }
  // What lies outside the picture counts nothing.
  void blank(const Xbyak::Zmm& in, int v, int k) {
    if (!g_.in_rows) return;
    const uint32_t mask = border(v, k);
    if (mask == 0xffff) return;
    if (g_.op == kMaximum)
      vmovaps(in | border_mask(~mask & 0xffff), zmm(lowest_));
    else
      vmovaps(in | border_mask(mask) | T_z, in);
  }
  uint32_t border(int v, int k) const {
    return lanes_inside(v * kLanes * g_.stride + k * g_.dilation_w - g_.left, g_.stride);
  }
  // A few of the masks stay in registers.
  const Xbyak::Opmask& border_mask(uint32_t mask) {
    const Xbyak::Opmask* kept[] = {&k5, &k6, &k7};
    for (size_t i = 0; i < borders_.size(); ++i)
      if (borders_[i] == mask) return *kept[i];
    set_mask(k4, mask);
    return k4;
  }
  void keep_border_masks() {
    const Xbyak::Opmask* kept[] = {&k5, &k6, &k7};
    for (int v = 0; v < vectors_ && g_.in_rows; ++v)
      for (int k = 0; k < g_.kernel_w; ++k) {
        const uint32_t inside = border(v, k), mask = g_.op == kMaximum ? ~inside & 0xffff : inside;
        const bool known = std::find(borders_.begin(), borders_.end(), mask) != borders_.end();
        if (inside == 0xffff || known || borders_.size() == 3) continue;
        set_mask(*kept[borders_.size()], mask);
        borders_.push_back(mask);
      }
  }
  // Of a tensor of the call nothing past a row is read. Rows of even length may also be read from their
  // second pixel on: the last lane of two registers is not used then.
  void load(const Xbyak::Zmm& to, int64_t from, int64_t column) {
    const bool second = g_.stride == 2 && g_.in_columns % 2 == 0;
    const uint32_t mask = g_.exact ? lanes_inside(column + second, 1) : 0xffff;
    if (mask == 0xffff) return vmovups(to, at(r8, from));
    set_mask(k4, mask);
    vmovups(to | k4 | T_z, at(r8, from));
  }

  // Three taps side by side lie in two registers of pixels.
  void shifted(int rows, int64_t row, int i, int v, int64_t from) {
    const auto in = [&](int k) { return zmm(sums_ + rows + k); };
    const Xbyak::Zmm high = in(3);
    for (const auto& [to, at_] : {std::pair{in(0), from}, std::pair{high, from + kLanes}})
      if (g_.relu_in)
        vmaxps(to, zmm(zero_), at(r8, at_));
      else
        vmovups(to, at(r8, at_));
    for (int k = 1; k < 3; ++k) valignd(in(k), high, in(0), k);
    for (int k = 0; k < 3; ++k) {
      blank(in(k), v, k);
      accumulate(rows, row, i, k, in(k));
    }
  }

  void side_by_side(int rows, int64_t row, int i, int v, int64_t from) {
    if (shifts_) return shifted(rows, row, i, v, from);
    const int temps = 32 - sums_ - rows;
    for (int k = 0; k < g_.kernel_w; ++k) {
      if (g_.op != kWeighted && k > 1) --turn_;  // not over what was combined
      const Xbyak::Zmm in = zmm(sums_ + rows + turn_++ % temps);
      load(in, from + k * g_.tap_column, v * kLanes);
      blank(in, v, k);
      accumulate(rows, row, i, k, in);
    }
  }

  // Two registers hold the first two taps; each further one takes one more element.
  void every_other(int rows, int64_t row, int i, int v, int64_t from) {
    const int first = sums_ + rows;
    const int64_t column = static_cast<int64_t>(v) * kLanes * 2;
    const auto in = [&](int k) { return zmm(first + 1 + k); };
    if (g_.kernel_w > 1 && g_.tap_column == 1) {
      vmovups(in(1), at(r8, from));
      vmovups(zmm(first), at(r8, from + kLanes));
      vmovaps(in(0), in(1));
      vpermt2ps(in(0), zmm(even_), zmm(first));
      vpermt2ps(in(1), zmm(odd_), zmm(first));
      for (int k = 2; k < g_.kernel_w; ++k) {
        vbroadcastss(zmm(first), at(r8, from + 2 * kLanes + k - 2));
        valignd(in(k), zmm(first), in(k - 2), 1);
      }
    } else {
      for (int k = 0; k < g_.kernel_w; ++k) {
        load(in(k), from + k * g_.tap_column, column);
        load(zmm(first), from + k * g_.tap_column + kLanes, column + kLanes);
        vpermt2ps(in(k), zmm(even_), zmm(first));
      }
    }
    for (int k = 0; k < g_.kernel_w; ++k) {
      blank(in(k), v, k);
      accumulate(rows, row, i, k, in(k));
    }
  }

  // A NaN stays one: vmaxps and vminps return their second source when either is NaN.
  void finish(int r, int v) {
    const Xbyak::Zmm a = zmm(sums_ + r);
    if (g_.op == kMean) vmulps(a, a, at(r14, (r * vectors_ + v) * kLanes));
    if (g_.scaled) {
      const Xbyak::Zmm scale = zmm(31);
      vbroadcastss(scale, at(rdx, 0));
      vfmadd213ps(a, scale, ptr_b[rdx + 4]);
    }
    if (g_.residual) vaddps(a, a, at(r11, r * g_.residual_pitch + v * kLanes));
    if (g_.activation != kNone) vmaxps(a, zmm(zero_), a);
    if (six_ >= 0) vminps(a, zmm(six_), a);
    const Xbyak::Address y = at(r9, r * g_.pitch + v * kLanes);
    if (v + 1 < vectors_ || g_.columns % kLanes == 0) {
      vmovups(y, a);
    } else {
      vmovaps(a | k1 | T_z, a);
      vmovups(y | k2, a);
    }
  }

  void indices() {
    align(64);
    L(table_);
    for (int first = 0; first < 2; ++first)
      for (int i = 0; i < kLanes; ++i) dd(2 * i + first);
  }

  EmitWindow g_;
  int vectors_, bias_, zero_, six_, lowest_, even_ = -1, odd_ = -1, sums_, turn_ = 0, combined_ = 0;
  bool in_registers_, shifts_;
  std::vector<uint32_t> borders_;
  Xbyak::Label table_;
};

class Emitted : public EmittedWindow {
 public:
  explicit Emitted(const EmitWindow& g) : code_(g) {}
  void run(const WindowArgs& args) const override { code_.run(args); }

 private:
  Emitter code_;
};

}  // namespace

std::unique_ptr<EmittedWindow> emit_window(const EmitWindow& g) {
  // Windows as wide as that would leave no registers for the sums.
  constexpr int64_t kWidest = 16;
  if (g.kernel_w > kWidest || g.kernel_h > kWidest) return nullptr;
  if (emit_unavailable() || g.activation > kRelu6 || g.stride > 2 || g.rows == 0 || g.columns == 0) return nullptr;
  try {
    return std::make_unique<Emitted>(g);
  } catch (const Xbyak::Error&) {
    return nullptr;  // too much code: a picture of very many columns
  }
}

#else

std::unique_ptr<EmittedWindow> emit_window(const EmitWindow&) { return nullptr; }

#endif

}  // namespace dass
