// Checks every kernel of the tables that this processor can run, and the ops on them, without torch:
//
//     check_kernels [ISA ...]
//
// prints per instruction set how many kernels, ops and values were compared; at the first wrong value, write
// out of bounds or crash it names the kernel and exits with 1.
#include <csignal>
#include <cstddef>

#include "checks.h"
#include "cpu/isa.h"

namespace checks {
namespace {

void crashed(int) {
  const auto say = [](const char* text, size_t n) { return write(STDOUT_FILENO, text, n); };
  const bool said = say("wrong: ", 7) > 0 && say(current().data(), current().size()) > 0 &&
                    say(": read or wrote out of bounds, or crashed\n", 43) > 0;
  _exit(said ? 1 : 2);
}

// From the first member on that is one, a table consists of kernels.
template <class T>
int64_t kernels_in(const dass::Kernels<T>& kernels) {
  constexpr size_t begin = offsetof(dass::Kernels<T>, spmm);
  int64_t found = 0;
  for (size_t at = begin; at < sizeof(kernels); at += sizeof(void*)) {
    void* kernel;
    std::memcpy(&kernel, reinterpret_cast<const char*>(&kernels) + at, sizeof(void*));
    found += kernel != nullptr;
  }
  return found;
}

int64_t kernels_in(const dass::DenseKernels& kernels) {
  int64_t found = 0;
  for (const auto fn : kernels.depthwise) found += fn != nullptr;
  return found + (kernels.pool != nullptr) + (kernels.map != nullptr) + (kernels.mean != nullptr) +
         (kernels.gemv != nullptr);
}

void expect_all(int64_t done, int64_t all) {
  if (done != all) fail(std::to_string(all - done) + " of " + std::to_string(all) + " kernels have no check");
}

template <class T>
int64_t check_table(const dass::Kernels<T>& kernels, const std::string& name) {
  const int64_t done = check_spmm(kernels, name) + check_blocked(kernels, name) + check_sddmm(kernels, name) +
                       check_gemv(kernels, name) + check_transpose(kernels, name);
  current() = name;
  expect_all(done, kernels_in(kernels));
  return done;
}

int64_t check_dense_table(const dass::KernelTable& table) {
  const int64_t done = check_dense(table);
  current() = table.isa;
  expect_all(done, kernels_in(*table.dense));
  return done;
}

template <class T>
int64_t check_ops(const std::string& name) {
  return check_convolutions<T>(name) + check_linears<T>(name);
}

int run(std::vector<std::string> isas) {
  if (isas.empty()) isas = dass::available_isas();
  for (const std::string& isa : isas) {
    const dass::KernelTable& table = dass::table_named(isa);
    const int64_t before = count();
    check_registers(isa);
    const int64_t kernels =
        check_table(table.f32, isa + " f32") + check_table(table.f64, isa + " f64") + check_dense_table(table);
    dass::set_isa(isa);
    check_program(isa);
    const int64_t ops = check_ops<float>(isa + " f32") + check_ops<double>(isa + " f64");
    std::printf("%s: %lld kernels and %lld ops right, %lld values compared\n", isa.c_str(),
                static_cast<long long>(kernels), static_cast<long long>(ops), static_cast<long long>(count() - before));
  }
  return 0;
}

}  // namespace
}  // namespace checks

int main(int argc, char** argv) {
  for (const int sig : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(sig, checks::crashed);
  return checks::run({argv + 1, argv + argc});
}
