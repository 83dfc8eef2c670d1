#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dass {

extern const KernelTable kTableScalar;
#if defined(__x86_64__)
extern const KernelTable kTableAvx2;
extern const KernelTable kTableAvx512;
#elif defined(__aarch64__)
extern const KernelTable kTableNeon;
#endif

namespace {

// Best first. __builtin_cpu_supports also asks whether the system saves the wide registers.
std::vector<const KernelTable*> supported() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512) tables.push_back(&kTableAvx512);
  if (avx2) tables.push_back(&kTableAvx2);
#elif defined(__aarch64__)
  tables.push_back(&kTableNeon);
#endif
  tables.push_back(&kTableScalar);
  return tables;
}

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> list = supported();
  return list;
}

std::atomic<const KernelTable*> active{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* t : tables()) names.emplace_back(t->isa);
  return names;
}

const KernelTable& table_named(const std::string& name) {
  std::string known;
  for (const KernelTable* t : tables()) {
    if (name == t->isa) return *t;
    known += known.empty() ? t->isa : std::string(", ") + t->isa;
  }
  throw std::invalid_argument("unknown or unsupported ISA '" + name + "'; this machine has: " + known);
}

const KernelTable& active_table() {
  const KernelTable* t = active.load(std::memory_order_acquire);
  if (t) return *t;
  const char* name = std::getenv("DASS_ISA");
  t = name && *name ? &table_named(name) : tables().front();
  active.store(t, std::memory_order_release);
  return *t;
}

void set_isa(const std::string& name) { active.store(&table_named(name), std::memory_order_release); }

}  // namespace dass
