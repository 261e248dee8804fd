// Cooperative threads: a stack each, switched by hand. x86-64 Linux has its own switch (a few nanoseconds); elsewhere
// ucontext does it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
#define CORTEXLOOP_FAST_SWITCH 1
extern "C" void cortexloop_fiber_switch(void** save, void* load);
#else
#define CORTEXLOOP_FAST_SWITCH 0
#include <ucontext.h>
#endif

namespace cortexloop::emulation {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kFiberStack = 256 * 1024;
#else
constexpr std::size_t kFiberStack = 128 * 1024;
#endif

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  // Makes this a fiber that calls `entry(argument)` on its first switch; `entry` ends with leave_for.
  void prepare(unsigned char* stack, std::size_t bytes, Entry entry, void* argument);

  // First thing in `entry`.
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &came_from_->stack_, &came_from_->bytes_);
#endif
  }

  // Stops here, which is where somebody's switch_to this fiber continues.
  void switch_to(Fiber& other) { go(other, false); }

  // Stops for good.
  [[noreturn]] void leave_for(Fiber& other) {
    go(other, true);
    __builtin_unreachable();
  }

 private:
  void set(unsigned char* stack, std::size_t bytes, Entry entry, void* argument);
  void go(Fiber& other, bool for_good);
  void exchange(Fiber& other);

  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  const void* stack_ = nullptr;
  std::size_t bytes_ = 0;
#if CORTEXLOOP_FAST_SWITCH
  static void begin(Fiber* self);
  void* saved_ = nullptr;
#else
  static void begin(unsigned high, unsigned low);
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  static inline thread_local Fiber* came_from_ = nullptr;
#endif
};

}  // namespace cortexloop::emulation
