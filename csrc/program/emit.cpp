#include "emit.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <type_traits>

#include "../cpu/isa.h"
#include "rows.h"

#ifdef DASS_XBYAK
#define XBYAK_NO_OP_NAMES
#include <xbyak/xbyak.h>
#endif

namespace dass {

#ifdef DASS_XBYAK
namespace {

// What the code of a tile reads, at the offsets that it knows.
struct Args {
  const float* x;
  float* y;
  const float* residual;
  const float* weights;
  const int32_t* blocks;
  int64_t count;
  float* partial;        // sums of this tile and block, from stage to stage
  int64_t partial_step;  // bytes from block to block
};
using Fn = void (*)(const Args*);

constexpr int kRegisters = 32;
constexpr int kLanes = 16;
constexpr size_t kMostCode = size_t{64} << 20;

// Weights are read in the order of the code: one pointer moves along them, since a displacement of one
// byte reaches 128 floats to either side.
constexpr int64_t kReach = 512;

class Emitter : public Xbyak::CodeGenerator {
 public:
  Emitter(size_t bytes, int vectors) : CodeGenerator(bytes, Xbyak::DontSetProtectRWE), vectors_(vectors) {}

  struct Part {
    int64_t row, end;  // rows
    int32_t from, to;  // offsets of entries
    bool first, last;  // stage
  };

  // Code for one part of the rows; appends what it reads to `weights`.
  void rows(const SparseRows& m, const Part& part, std::vector<float>& weights) {
    weights_ = &weights;
    start_ = weights.size();
    rows_ = static_cast<int>(part.end - part.row);
    cached_.clear();
    Xbyak::Label loop;
    push(rbx);
    push(r12);
    push(r13);
    arguments();
    L(loop);
    begin_block(m, part);
    for (int r = 0; r < rows_; ++r) begin_row(m.bias[part.row + r], r, part.first);
    entries(m, part);
    if (part.last)
      finish(m, part.row);
    else
      for (int i = 0; i < rows_ * vectors_; ++i) vmovups(ptr[r13 + 64 * i], Xbyak::Zmm(i));
    add(r8, (2 + vectors_) * sizeof(int32_t));
    add(r13, ptr[rdi + offsetof(Args, partial_step)]);
    dec(r9);
    jnz(loop, T_NEAR);
    pop(r13);
    pop(r12);
    pop(rbx);
    vzeroupper();
    ret();
  }

 private:
  Xbyak::Zmm sum(int r, int v) const { return Xbyak::Zmm(r * vectors_ + v); }

  void arguments() {
    mov(rcx, ptr[rdi + offsetof(Args, weights)]);
    mov(r8, ptr[rdi + offsetof(Args, blocks)]);
    mov(r9, ptr[rdi + offsetof(Args, count)]);
    mov(r13, ptr[rdi + offsetof(Args, partial)]);
  }

  void begin_block(const SparseRows& m, const Part& part) {
    const auto place = [&](const Xbyak::Reg64& to, size_t base) {
      mov(rdx, ptr[rdi + base]);
      lea(to, ptr[rdx + rax * 4]);
    };
    movsxd(rax, dword[r8]);
    place(r10, offsetof(Args, x));
    movsxd(rax, dword[r8 + 4]);
    place(r11, offsetof(Args, y));
    if (m.residual) place(r12, offsetof(Args, residual));
    if (part.last)
      for (int v = 0; v < vectors_; ++v) kmovw(Xbyak::Opmask(v + 1), word[r8 + (2 + v) * sizeof(int32_t)]);
    lea(rbx, ptr[rcx + kReach]);
    reached_ = kReach;
  }

  void begin_row(float bias, int r, bool first) {
    if (!first) {
      for (int v = 0; v < vectors_; ++v) vmovups(sum(r, v), ptr[r13 + 64 * (r * vectors_ + v)]);
      return;
    }
    vbroadcastss(sum(r, 0), weight(bias));
    for (int v = 1; v < vectors_; ++v) vmovaps(sum(r, v), sum(r, 0));
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

  using Readers = std::vector<std::pair<int, float>>;

  // Column by column, so that pixels loaded once serve every row of the tile that reads them. Columns
  // that lie in the same lines of memory, the taps of a k x k convolution, are shifted out of them.
  void entries(const SparseRows& m, const Part& part) {
    std::map<int32_t, std::map<int, Readers>> lines;
    for (int64_t r = part.row; r < part.end; ++r)
      for (int32_t i = m.indptr[r]; i < m.indptr[r + 1]; ++i) {
        const int32_t at = m.offsets[i];
        if (at < part.from || at >= part.to) continue;
        const int shift = (at % kLanes + kLanes) % kLanes;
        lines[(at - shift) / kLanes][shift].emplace_back(static_cast<int>(r - part.row), m.values[i]);
      }
    next_ = rows_ * vectors_;
    relu_in_ = m.relu_in;
    const int registers = kRegisters - relu_in_;  // the last one holds zeros
    if (relu_in_) vpxord(Xbyak::Zmm(31), Xbyak::Zmm(31), Xbyak::Zmm(31));
    const int left = registers - next_;
    // Registers: V shifted columns and a weight (V > 1), then lines.
    shifted_ = next_;
    weight_ = next_ + vectors_;
    line_ = weight_ + (vectors_ > 1);
    line_count_ = registers - line_;
    const bool shifts = line_count_ >= vectors_ + 1;
    for (const auto& [line, columns] : lines)
      for (const auto& [shift, readers] : columns) {
        const bool shared = shifts && shift && (columns.size() > 1 || vectors_ > 1 || is_cached(line));
        if (shared)
          shifted(line, shift, readers);
        else
          plain(line * kLanes + shift, readers, left);
      }
  }

  bool is_cached(int32_t line) const { return std::find(cached_.begin(), cached_.end(), line) != cached_.end(); }

  // The register that holds a line, loaded if none does.
  Xbyak::Zmm line(int32_t wanted) {
    auto found = std::find(cached_.begin(), cached_.end(), wanted);
    if (found == cached_.end()) {
      if (cached_.size() < static_cast<size_t>(line_count_))
        found = cached_.insert(cached_.end(), wanted);
      else
        found = std::min_element(cached_.begin(), cached_.end());  // lines come in ascending order
      *found = wanted;
      load(Xbyak::Zmm(line_ + static_cast<int>(found - cached_.begin())), ptr[r10 + wanted * kLanes * 4]);
    }
    return Xbyak::Zmm(line_ + static_cast<int>(found - cached_.begin()));
  }

  void shifted(int32_t first, int shift, const Readers& readers) {
    for (int v = 0; v < vectors_; ++v) {
      const Xbyak::Zmm low = line(first + v), high = line(first + v + 1);
      valignd(Xbyak::Zmm(shifted_ + v), high, low, shift);
    }
    multiply(readers, [&](int v) { return Xbyak::Zmm(shifted_ + v); });
  }

  void plain(int32_t offset, const Readers& readers, int left) {
    const auto pixels = [&](int v) { return ptr[r10 + 4 * offset + 64 * v]; };
    if (left > vectors_ && (readers.size() > 1 || vectors_ == 1 || relu_in_)) {
      for (int v = 0; v < vectors_; ++v) load(Xbyak::Zmm(shifted_ + v), pixels(v));
      multiply(readers, [&](int v) { return Xbyak::Zmm(shifted_ + v); });
    } else if (relu_in_) {
      const Xbyak::Zmm one(next_ + 1);
      multiply(readers, [&](int v) {
        load(one, pixels(v));
        return one;
      });
    } else {
      multiply(readers, pixels);
    }
  }

  void load(const Xbyak::Zmm& to, const Xbyak::Address& from) {
    if (relu_in_)
      vmaxps(to, Xbyak::Zmm(31), from);
    else
      vmovups(to, from);
  }

  template <class Pixels>
  void multiply(const Readers& readers, Pixels pixels) {
    for (const auto& [r, value] : readers) {
      if constexpr (std::is_same_v<decltype(pixels(0)), Xbyak::Zmm>) {
        if (vectors_ == 1) {
          vfmadd231ps(sum(r, 0), pixels(0), weight(value, true));
          continue;
        }
      }
      const Xbyak::Zmm w(weight_ < kRegisters - relu_in_ ? weight_ : next_);
      vbroadcastss(w, weight(value));
      for (int v = 0; v < vectors_; ++v) vfmadd231ps(sum(r, v), w, pixels(v));
    }
  }

  // A NaN stays one: vmaxps and vminps return their second source when either is NaN.
  void finish(const SparseRows& m, int64_t row) {
    const Xbyak::Zmm zero(31), six(30);
    if (m.activation != kNone) vpxord(zero, zero, zero);
    if (m.activation == kRelu6) {
      mov(eax, 0x40c00000);  // 6.0f
      vpbroadcastd(six, eax);
    }
    for (int r = 0; r < rows_; ++r)
      for (int v = 0; v < vectors_; ++v) {
        const Xbyak::Zmm a = sum(r, v);
        const auto kept = a | Xbyak::Opmask(v + 1) | T_z;
        const int64_t to = m.output[row + r];
        if (m.residual) vaddps(a, a, ptr[r12 + static_cast<int>(to * m.ldr * 4 + 64 * v)]);
        if (m.activation == kNone) vmovaps(kept, a);
        if (m.activation != kNone) vmaxps(kept, zero, a);
        if (m.activation == kRelu6) vminps(a, six, a);
        vmovups(ptr[r11 + static_cast<int>(to * m.ldy * 4 + 64 * v)], a);
      }
  }

  bool relu_in_ = false;
  int vectors_, rows_ = 0, next_ = 0, shifted_ = 0, weight_ = 0, line_ = 0, line_count_ = 0;
  std::vector<int32_t> cached_;
  std::vector<float>* weights_ = nullptr;
  size_t start_ = 0;
  int64_t reached_ = 0;
};

class Emitted : public EmittedRows {
 public:
  Emitted(const SparseRows& m, const EmitTile& tile, size_t bytes)
      : code_(bytes, tile.vectors), vectors_(tile.vectors) {
    tiles_ = (m.rows() + tile.height - 1) / tile.height;
    stages_ = static_cast<int64_t>(tile.cuts.size()) + 1;
    for (int64_t s = 0; s < stages_; ++s)
      for (int64_t t = 0; t < tiles_; ++t) {
        const int32_t from = s ? tile.cuts[s - 1] : INT32_MIN, to = s + 1 < stages_ ? tile.cuts[s] : INT32_MAX;
        code_.align(64);
        entries_.push_back(code_.getSize());
        begins_.push_back(weights_.size());
        rows_.push_back(m.rows() * t / tiles_);
        code_.rows(m, {rows_.back(), m.rows() * (t + 1) / tiles_, from, to, s == 0, s + 1 == stages_}, weights_);
      }
    code_.setProtectModeRE();
    for (size_t& at : entries_) at += reinterpret_cast<size_t>(code_.getCode());
  }
  void run(int64_t first, int64_t last, const float* x, float* y, const float* residual, const int32_t* blocks, int64_t,
           int64_t count) const override {
    Args a{x, y, residual, nullptr, blocks, count, nullptr, 0};
    const int64_t row = rows_[first], floats = vectors_ * kLanes;
    const int64_t all = (last < tiles_ ? rows_[last] : rows_.back() + kRegisters) - row;
    float* partial = stages_ > 1 ? scratch_floats(kPartialScratch, all * floats * count) : nullptr;
    a.partial_step = all * floats * static_cast<int64_t>(sizeof(float));
    for (int64_t s = 0; s < stages_; ++s)
      for (int64_t t = first; t < last; ++t) {
        a.partial = partial ? partial + (rows_[t] - row) * floats : nullptr;
        a.weights = weights_.data() + begins_[s * tiles_ + t];
        reinterpret_cast<Fn>(entries_[s * tiles_ + t])(&a);
      }
  }
  int64_t tiles() const override { return tiles_; }
  int64_t code_bytes() const override { return static_cast<int64_t>(code_.getSize()); }

 private:
  Emitter code_;
  int64_t vectors_, tiles_, stages_;
  std::vector<size_t> entries_, begins_;
  std::vector<int64_t> rows_;  // first of each tile
  std::vector<float> weights_;
};

// Whether there are registers for the sums, the constants of the activation, a weight or pixels, and
// for a mask of each vector.
bool fits(const EmitTile& tile) {
  return tile.height > 0 && tile.vectors > 0 && tile.vectors <= 7 && tile.height * tile.vectors + 3 <= kRegisters;
}

// At most this many bytes of code for these rows.
size_t code_bound(const SparseRows& m, const EmitTile& tile) {
  const size_t tiles = (m.rows() + tile.height - 1) / tile.height, stages = tile.cuts.size() + 1;
  const size_t entry = 16 + 11 * 3 * tile.vectors + 8;
  return m.count() * entry + stages * (m.rows() * (16 + 48 * tile.vectors) + tiles * 512) + 4096;
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

std::unique_ptr<EmittedRows> emit_rows(const SparseRows& rows, const EmitTile& tile) {
  if (emit_unavailable() || rows.rows() == 0 || !fits(tile)) return nullptr;
  if (rows.activation == kHardswish) return nullptr;
  const size_t bytes = code_bound(rows, tile);
  if (bytes > kMostCode) return nullptr;
  return std::make_unique<Emitted>(rows, tile, bytes);
}

#else

const char* emit_unavailable() { return "built without Xbyak's headers (libxbyak-dev)"; }
std::unique_ptr<EmittedRows> emit_rows(const SparseRows&, const EmitTile&) { return nullptr; }

#endif

}  // namespace dass
