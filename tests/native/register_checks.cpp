// Moving, choosing and comparing the lanes of a register.
#include "checks.h"
#include "registers.h"

namespace checks {
namespace {

template <class T>
void check_keep(const RegisterFns<T>& fns) {
  Guarded<T> a(fns.lanes), out(fns.lanes);
  for (uint32_t mask = 0; mask < 1u << fns.lanes; ++mask) {
    for (int i = 0; i < fns.lanes; ++i) a[i] = mask >> i & 1u ? static_cast<T>(i + 1) : poison<T>();
    fns.keep(a.data(), mask, out.data());
    for (int i = 0; i < fns.lanes; ++i) expect(out[i], mask >> i & 1u ? i + 1 : 0, 0, "keep", i);
  }
}

void check_orders(const Registers& r) {
  const int n = r.f32.lanes;
  Guarded<float> a(n), b(n), out(n);
  for (int i = 0; i < n; ++i) a[i] = static_cast<float>(i), b[i] = static_cast<float>(n + i);
  r.even(a.data(), b.data(), out.data());
  for (int i = 0; i < n; ++i) expect(out[i], 2 * i, 0, "even", i);
  r.odd(a.data(), b.data(), out.data());
  for (int i = 0; i < n; ++i) expect(out[i], 2 * i + 1, 0, "odd", i);
  r.shift_in(a.data(), 99, out.data());
  for (int i = 0; i < n; ++i) expect(out[i], i + 1 < n ? i + 1 : 99, 0, "shift_in", i);
}

void check_larger(const Registers& r) {
  const float values[] = {-2, 3, poison<float>(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()};
  const int n = r.f32.lanes;
  Guarded<float> a(n), b(n), out(n);
  for (const float x : values)
    for (const float y : values) {
      for (int i = 0; i < n; ++i) a[i] = x, b[i] = y;
      r.larger(a.data(), b.data(), out.data());
      const double want = std::isnan(x) || std::isnan(y) ? std::nan("") : std::max(x, y);
      for (int i = 0; i < n; ++i) expect(out[i], want, 0, "larger", i);
    }
}

}  // namespace

void check_registers(const std::string& isa) {
  const std::pair<const char*, const Registers*> built[] = {{"scalar", &kRegistersScalar},
                                                            {"avx2", &kRegistersAvx2},
                                                            {"avx512", &kRegistersAvx512},
                                                            {"neon", &kRegistersNeon}};
  current() = isa + " registers";
  for (const auto& [name, registers] : built) {
    if (isa != name) continue;
    if (!registers) fail("not built");
    check_keep(registers->f32);
    check_keep(registers->f64);
    check_orders(*registers);
    check_larger(*registers);
  }
}

}  // namespace checks
