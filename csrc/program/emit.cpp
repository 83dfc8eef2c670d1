#include "emit.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "../cpu/isa.h"
#include "rows.h"

#ifdef DASS_XBYAK
#define XBYAK_NO_OP_NAMES
#include <xbyak/xbyak.h>
#endif

namespace dass {

#ifdef DASS_XBYAK
namespace {

using Fn = void (*)(const float* x, float* y, const float* residual, const float* weights, const int32_t* blocks,
                    int64_t count);

constexpr int kRegisters = 32;
constexpr size_t kMostCode = size_t{64} << 20;

// Weights are read in the order of the code: one pointer moves along them, since a displacement of one
// byte reaches 128 floats to either side.
constexpr int64_t kReach = 512;

class Emitter : public Xbyak::CodeGenerator {
 public:
  Emitter(size_t bytes, EmitTile tile) : CodeGenerator(bytes, Xbyak::DontSetProtectRWE), tile_(tile) {}

  // Code for rows [first, last); appends what it reads to `weights`.
  void rows(const SparseRows& m, int64_t first, int64_t last, std::vector<float>& weights) {
    weights_ = &weights;
    start_ = weights.size();
    const int count = static_cast<int>(last - first);
    Xbyak::Label loop;
    push(rbx);
    push(r12);
    prepare(m);
    L(loop);
    begin_block(m);
    for (int r = 0; r < count; ++r) {
      vbroadcastss(sum(r, 0), weight(m.bias[first + r]));
      for (int v = 1; v < tile_.vectors; ++v) vmovaps(sum(r, v), sum(r, 0));
    }
    entries(m, first, last);
    for (int r = 0; r < count; ++r)
      for (int v = 0; v < tile_.vectors; ++v) finish(m, m.output[first + r], r, v);
    add(r8, (2 + tile_.vectors) * sizeof(int32_t));
    dec(r9);
    jnz(loop, T_NEAR);
    pop(r12);
    pop(rbx);
    vzeroupper();
    ret();
  }

 private:
  Xbyak::Zmm sum(int r, int v) const { return Xbyak::Zmm(r * tile_.vectors + v); }
  Xbyak::Zmm zero() const { return Xbyak::Zmm(31); }
  Xbyak::Zmm six() const { return Xbyak::Zmm(30); }
  int constants(Activation a) const { return a == kNone ? 0 : a == kRelu ? 1 : 2; }

  void prepare(const SparseRows& m) {
    if (m.activation != kNone) vpxord(zero(), zero(), zero());
    if (m.activation == kRelu6) {
      mov(eax, 0x40c00000);  // 6.0f
      vpbroadcastd(six(), eax);
    }
  }

  void begin_block(const SparseRows& m) {
    movsxd(rax, dword[r8]);
    lea(r10, ptr[rdi + rax * 4]);
    movsxd(rax, dword[r8 + 4]);
    lea(r11, ptr[rsi + rax * 4]);
    if (m.residual) lea(r12, ptr[rdx + rax * 4]);
    for (int v = 0; v < tile_.vectors; ++v) kmovw(Xbyak::Opmask(v + 1), word[r8 + (2 + v) * sizeof(int32_t)]);
    lea(rbx, ptr[rcx + kReach]);
    reached_ = kReach;
  }

  // The address of the next weight.
  Xbyak::Address weight(float value, bool broadcast = false) {
    int64_t at = static_cast<int64_t>(weights_->size() - start_) * 4 - reached_;
    if (at >= kReach) {
      add(rbx, 2 * kReach);
      reached_ += 2 * kReach;
      at -= 2 * kReach;
    }
    weights_->push_back(value);
    return broadcast ? ptr_b[rbx + static_cast<int>(at)] : ptr[rbx + static_cast<int>(at)];
  }

  // Column by column, so that pixels loaded once serve every row of the tile that reads them.
  void entries(const SparseRows& m, int64_t first, int64_t last) {
    std::map<int32_t, std::vector<std::pair<int, float>>> columns;
    for (int64_t r = first; r < last; ++r)
      for (int32_t i = m.indptr[r]; i < m.indptr[r + 1]; ++i)
        columns[m.offsets[i]].emplace_back(static_cast<int>(r - first), m.values[i]);
    const int V = tile_.vectors;
    const int used = static_cast<int>(last - first) * V, left = kRegisters - constants(m.activation) - used;
    int turn = 0;
    for (const auto& [offset, readers] : columns) {
      const auto pixels = [&, at = offset](int v) { return ptr[r10 + static_cast<int>(4 * at + 64 * v)]; };
      if (V == 1) {
        const Xbyak::Zmm x(used + turn++ % left);
        vmovups(x, pixels(0));
        for (const auto& [r, value] : readers) vfmadd231ps(sum(r, 0), x, weight(value, true));
        continue;
      }
      const bool load = readers.size() > 1 && left > V;
      const Xbyak::Zmm w(used);
      if (load)
        for (int v = 0; v < V; ++v) vmovups(Xbyak::Zmm(used + 1 + v), pixels(v));
      for (const auto& [r, value] : readers) {
        vbroadcastss(w, weight(value));
        for (int v = 0; v < V; ++v)
          if (load)
            vfmadd231ps(sum(r, v), w, Xbyak::Zmm(used + 1 + v));
          else
            vfmadd231ps(sum(r, v), w, pixels(v));
      }
    }
  }

  // A NaN stays one: vmaxps and vminps return their second source when either is NaN.
  void finish(const SparseRows& m, int64_t row, int r, int v) {
    const Xbyak::Zmm a = sum(r, v);
    const auto kept = a | Xbyak::Opmask(v + 1) | T_z;
    if (m.residual) vaddps(a, a, ptr[r12 + static_cast<int>(row * m.ldr * 4 + 64 * v)]);
    switch (m.activation) {
      case kRelu:
        vmaxps(kept, zero(), a);
        break;
      case kRelu6:
        vmaxps(kept, zero(), a);
        vminps(a, six(), a);
        break;
      default:
        vmovaps(kept, a);
    }
    vmovups(ptr[r11 + static_cast<int>(row * m.ldy * 4 + 64 * v)], a);
  }

  EmitTile tile_;
  std::vector<float>* weights_ = nullptr;
  size_t start_ = 0;
  int64_t reached_ = 0;
};

class Emitted : public EmittedRows {
 public:
  Emitted(const SparseRows& m, EmitTile tile, size_t bytes) : code_(bytes, tile) {
    const int64_t parts = (m.rows() + tile.height - 1) / tile.height;
    for (int64_t t = 0; t < parts; ++t) {
      const int64_t first = m.rows() * t / parts, last = m.rows() * (t + 1) / parts;
      code_.align(64);
      entries_.push_back(code_.getSize());
      begins_.push_back(weights_.size());
      code_.rows(m, first, last, weights_);
    }
    code_.setProtectModeRE();
    for (size_t& at : entries_) at += reinterpret_cast<size_t>(code_.getCode());
  }
  void run(int64_t first, int64_t last, const float* x, float* y, const float* residual, const int32_t* blocks, int64_t,
           int64_t count) const override {
    for (int64_t t = first; t < last; ++t)
      reinterpret_cast<Fn>(entries_[t])(x, y, residual, weights_.data() + begins_[t], blocks, count);
  }
  int64_t tiles() const override { return static_cast<int64_t>(entries_.size()); }
  int64_t code_bytes() const override { return static_cast<int64_t>(code_.getSize()); }

 private:
  Emitter code_;
  std::vector<size_t> entries_;
  std::vector<size_t> begins_;
  std::vector<float> weights_;
};

// Whether there are registers for the sums, the constants of the activation, a weight or pixels, and
// for a mask of each vector.
bool fits(EmitTile tile) {
  return tile.height > 0 && tile.vectors > 0 && tile.vectors <= 7 && tile.height * tile.vectors + 3 <= kRegisters;
}

// At most this many bytes of code for these rows.
size_t code_bound(const SparseRows& m, EmitTile tile) {
  const size_t tiles = (m.rows() + tile.height - 1) / tile.height;
  const size_t entry = 16 + 11 * 2 * tile.vectors + 8;
  return m.count() * entry + m.rows() * (16 + 48 * tile.vectors) + tiles * 512 + 4096;
}

}  // namespace

const char* emit_unavailable() {
  static const char* const reason = []() -> const char* {
    const char* wish = std::getenv("DASS_EMIT");
    if (wish && !std::strcmp(wish, "0")) return "DASS_EMIT=0";
    try {
      Xbyak::CodeGenerator probe(4096, Xbyak::DontSetProtectRWE);
      probe.ret();
      probe.setProtectModeRE();
    } catch (const Xbyak::Error&) {
      return "memory may not be made executable here";
    }
    return nullptr;
  }();
  if (reason) return reason;
  return std::strcmp(active_table().isa, "avx512") ? "emitted code needs AVX-512" : nullptr;
}

std::unique_ptr<EmittedRows> emit_rows(const SparseRows& rows, EmitTile tile) {
  if (emit_unavailable() || rows.rows() == 0 || !fits(tile)) return nullptr;
  if (rows.activation == kHardswish) return nullptr;
  const size_t bytes = code_bound(rows, tile);
  if (bytes > kMostCode) return nullptr;
  return std::make_unique<Emitted>(rows, tile, bytes);
}

#else

const char* emit_unavailable() { return "built without Xbyak's headers (libxbyak-dev)"; }
std::unique_ptr<EmittedRows> emit_rows(const SparseRows&, EmitTile) { return nullptr; }

#endif

}  // namespace dass
