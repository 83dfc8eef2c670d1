// Machine code for a dense depthwise convolution of planes: every distance is a constant of the code,
// the weights of a channel stay in registers, and several rows share what they read.
#include <algorithm>

#include "emit.h"
#include "step.h"

#ifdef DASS_XBYAK
#define XBYAK_NO_OP_NAMES
#include <xbyak/xbyak.h>
#endif

namespace dass {

#ifdef DASS_XBYAK
namespace {

using Fn = void (*)(const float* x, float* y, const float* weights, int64_t channels);
constexpr int kLanes = 16;
constexpr size_t kMostCode = size_t{1} << 20;
constexpr int64_t kMostColumns = 1024;  // a register of 7 x 7 windows takes up to 11 KB of code

class Emitter : public Xbyak::CodeGenerator {
 public:
  explicit Emitter(const EmitDepthwise& g) : CodeGenerator(kMostCode, Xbyak::DontSetProtectRWE), g_(g) {
    vectors_ = static_cast<int>((g.columns + kLanes - 1) / kLanes);
    in_registers_ = g.kernel == 3 || (g.kernel == 5 && g.stride == 1);
    together_ = g.stride_row == down() * g.tap_row;
    int next = in_registers_ ? taps() : 0;
    bias_ = next++;
    low_ = g.activation == kNone ? -1 : next++;
    high_ = g.activation == kRelu6 ? next++ : -1;
    if (g.stride == 2) even_ = next++, odd_ = next++;
    sums_ = next;
    const int fetched = g.stride == 2 ? static_cast<int>(g.kernel) + 2 : 3;
    const int most = 32 - sums_ - fetched;
    int rows = g.kernel == 3 && g.rows % 7 == 0 ? 7 : 8;
    rows = std::min({rows, most, static_cast<int>(g.rows)});
    generate(together_ ? rows : 1);
    setProtectModeRE();
  }
  void run(const float* x, float* y, const float* weights, int64_t channels) const {
    if (channels) getCode<Fn>()(x, y, weights, channels);
  }

 private:
  int taps() const { return static_cast<int>(g_.kernel * g_.kernel); }
  int down() const { return static_cast<int>(g_.stride); }
  Xbyak::Zmm zmm(int i) const { return Xbyak::Zmm(i); }
  Xbyak::Address at(const Xbyak::Reg64& base, int64_t floats) { return ptr[base + static_cast<int>(floats * 4)]; }

  void generate(int rows) {
    Xbyak::Label channel, group;
    constants();
    L(channel);
    if (in_registers_)
      for (int k = 0; k < taps(); ++k) vbroadcastss(zmm(k), at(rdx, k));
    vbroadcastss(zmm(bias_), at(rdx, taps()));
    mov(r8, rdi);
    mov(r9, rsi);
    const int64_t groups = g_.rows / rows;
    mov(r10, groups);
    L(group);
    some_rows(rows);
    add(r8, static_cast<int>(rows * g_.stride_row * 4));
    add(r9, static_cast<int>(rows * g_.pitch * 4));
    dec(r10);
    jnz(group, T_NEAR);
    if (const int left = static_cast<int>(g_.rows - groups * rows)) some_rows(left);
    add(rdi, static_cast<int>(g_.x_channel * 4));
    add(rsi, static_cast<int>(g_.y_channel * 4));
    add(rdx, (taps() + 1) * 4);
    dec(rcx);
    jnz(channel, T_NEAR);
    vzeroupper();
    ret();
    if (g_.stride == 2) indices();
  }

  void constants() {
    if (low_ >= 0) vpxord(zmm(low_), zmm(low_), zmm(low_));
    if (high_ >= 0) {
      mov(eax, 0x40c00000);  // 6.0f
      vpbroadcastd(zmm(high_), eax);
    }
    if (g_.stride == 2) {
      lea(rax, ptr[rip + table_]);
      vmovups(zmm(even_), ptr[rax]);
      vmovups(zmm(odd_), ptr[rax + 64]);
    }
    // k1: the pixels of a row's last register, k2: those and the zeros behind them, k3: further zeros.
    const int64_t whole = static_cast<int64_t>(vectors_) * kLanes, all = g_.columns + g_.zeros;
    set_mask(k1, g_.columns - (vectors_ - 1) * kLanes);
    set_mask(k2, std::min<int64_t>(kLanes, all - (vectors_ - 1) * kLanes));
    if (all > whole) set_mask(k3, all - whole);
  }
  void set_mask(const Xbyak::Opmask& k, int64_t lanes) {
    mov(eax, static_cast<uint32_t>((uint64_t{1} << lanes) - 1));
    kmovw(k, eax);
  }

  void some_rows(int rows) {
    for (int v = 0; v < vectors_; ++v) {
      for (int r = 0; r < rows; ++r) vmovaps(zmm(sums_ + r), zmm(bias_));
      const int reach = static_cast<int>(g_.kernel) + (rows - 1) * down();
      for (int i = 0; i < reach; ++i) {
        const int64_t from = i * g_.tap_row + static_cast<int64_t>(v) * kLanes * g_.stride;
        if (g_.stride == 1)
          side_by_side(rows, i, from);
        else
          every_other(rows, i, from);
      }
      for (int r = 0; r < rows; ++r) store(r, v);
    }
    if (g_.columns + g_.zeros > static_cast<int64_t>(vectors_) * kLanes) {
      vpxord(zmm(sums_), zmm(sums_), zmm(sums_));
      for (int r = 0; r < rows; ++r) vmovups(at(r9, r * g_.pitch + vectors_ * kLanes) | k3, zmm(sums_));
    }
  }

  // Input row i is tap i - r * down of output row r.
  void multiply(int rows, int i, int k, const Xbyak::Zmm& in) {
    for (int r = 0; r < rows; ++r) {
      const int tap = i - r * down();
      if (tap < 0 || tap >= g_.kernel) continue;
      const int w = tap * static_cast<int>(g_.kernel) + k;
      if (in_registers_)
        vfmadd231ps(zmm(sums_ + r), in, zmm(w));
      else
        vfmadd231ps(zmm(sums_ + r), in, ptr_b[rdx + 4 * w]);
    }
  }

  void side_by_side(int rows, int i, int64_t from) {
    const int temps = 32 - sums_ - rows;
    for (int k = 0; k < g_.kernel; ++k) {
      const Xbyak::Zmm in = zmm(sums_ + rows + turn_++ % temps);
      vmovups(in, at(r8, from + k * g_.tap_column));
      multiply(rows, i, k, in);
    }
  }

  // Two registers hold the first two taps; each further one takes one more element.
  void every_other(int rows, int i, int64_t from) {
    const int first = sums_ + rows;
    const auto in = [&](int k) { return zmm(first + 1 + k); };
    if (g_.tap_column == 1) {
      vmovups(in(1), at(r8, from));
      vmovups(zmm(first), at(r8, from + kLanes));
      vmovaps(in(0), in(1));
      vpermt2ps(in(0), zmm(even_), zmm(first));
      vpermt2ps(in(1), zmm(odd_), zmm(first));
      for (int k = 2; k < g_.kernel; ++k) {
        vbroadcastss(zmm(first), at(r8, from + 2 * kLanes + k - 2));
        valignd(in(k), zmm(first), in(k - 2), 1);
      }
    } else {
      for (int k = 0; k < g_.kernel; ++k) {
        vmovups(in(k), at(r8, from + k * g_.tap_column));
        vpermt2ps(in(k), zmm(even_), at(r8, from + k * g_.tap_column + kLanes));
      }
    }
    for (int k = 0; k < g_.kernel; ++k) multiply(rows, i, k, in(k));
  }

  // A NaN stays one: vmaxps and vminps return their second source when either is NaN.
  void store(int r, int v) {
    const Xbyak::Zmm a = zmm(sums_ + r);
    if (low_ >= 0) vmaxps(a, zmm(low_), a);
    if (high_ >= 0) vminps(a, zmm(high_), a);
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

  EmitDepthwise g_;
  int vectors_, bias_, low_, high_, even_ = -1, odd_ = -1, sums_, turn_ = 0;
  bool in_registers_, together_;
  Xbyak::Label table_;
};

class Emitted : public EmittedDepthwise {
 public:
  explicit Emitted(const EmitDepthwise& g) : code_(g) {}
  void run(const float* x, float* y, const float* weights, int64_t channels) const override {
    code_.run(x, y, weights, channels);
  }

 private:
  Emitter code_;
};

}  // namespace

std::unique_ptr<EmittedDepthwise> emit_depthwise(const EmitDepthwise& g) {
  if (emit_unavailable() || g.activation > kRelu6 || g.stride > 2 || g.rows == 0) return nullptr;
  // The code grows with the columns, and writes one register of zeros past a row's last one.
  const int64_t whole = (g.columns + kLanes - 1) / kLanes * kLanes;
  if (g.columns > kMostColumns || g.columns + g.zeros > whole + kLanes) return nullptr;
  return std::make_unique<Emitted>(g);
}

#else

std::unique_ptr<EmittedDepthwise> emit_depthwise(const EmitDepthwise&) { return nullptr; }

#endif

}  // namespace dass
