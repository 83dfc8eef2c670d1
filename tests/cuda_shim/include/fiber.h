// Fibers: one stack each, switched by hand on x86-64 and by ucontext elsewhere.
//
// AddressSanitizer is told of every switch, or it would take one fiber's frames for another's.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(SHIM_UCONTEXT)
#define SHIM_ASSEMBLY
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

#if defined(SHIM_ASSEMBLY)
// Saves the callee-saved registers and the stack pointer of one fiber and takes those of another.
asm(R"(
.pushsection .text.shim_switch,"axG",@progbits,shim_switch,comdat
.weak shim_switch
.hidden shim_switch
.type shim_switch,@function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch,.-shim_switch
.popsection
)");
extern "C" __attribute__((visibility("hidden"))) void shim_switch(void** from, void* to);
#endif

class Fiber {
 public:
  Fiber() = default;  // the fiber of whoever calls: it has a stack already
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_) munmap(stack_, kStack);
  }

  // Makes the next switch to this fiber call entry(), which must not return.
  void start(void (*entry)()) {
    if (!stack_) {
      stack_ = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (stack_ == MAP_FAILED) throw std::bad_alloc();
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStack);
    fake_stack_ = nullptr;
#endif
#if defined(SHIM_ASSEMBLY)
    void** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStack - 64);
    *--top = nullptr;  // the entry finds the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // To be called first in entry().
  static void arrived(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(&from.bottom_), &from.size_);
#else
    (void)from;
#endif
  }

  void switch_to(Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, to.stack_ ? to.stack_ : to.bottom_, to.stack_ ? kStack : to.size_);
#endif
#if defined(SHIM_ASSEMBLY)
    shim_switch(&pointer_, to.pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  static constexpr size_t kStack = 256 << 10;  // mapped, so only what is touched costs memory
  void* stack_ = nullptr;
#if defined(SHIM_ASSEMBLY)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

}  // namespace shim
