#include "fiber.h"

namespace cortexloop::emulation {

void Fiber::set(unsigned char* stack, std::size_t bytes, Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  stack_ = stack;
  bytes_ = bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);  // a fiber that was abandoned leaves its marks
#endif
}

void Fiber::go(Fiber& other, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  came_from_ = this;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, other.stack_, other.bytes_);
#endif
  exchange(other);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &came_from_->stack_, &came_from_->bytes_);
#endif
  (void)for_good;
}

#if CORTEXLOOP_FAST_SWITCH

// Saves what a function call must preserve, exchanges the stacks, and returns on the other one.
asm(R"(
  .text
  .type cortexloop_fiber_switch, @function
cortexloop_fiber_switch:
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
  .size cortexloop_fiber_switch, . - cortexloop_fiber_switch
  .type cortexloop_fiber_begin, @function
cortexloop_fiber_begin:
  movq %r12, %rdi
  callq *%r13
  ud2
  .size cortexloop_fiber_begin, . - cortexloop_fiber_begin
)");
extern "C" void cortexloop_fiber_begin();

void Fiber::begin(Fiber* self) { self->entry_(self->argument_); }

void Fiber::prepare(unsigned char* stack, std::size_t bytes, Entry entry, void* argument) {
  set(stack, bytes, entry, argument);
  // What the first switch pops: r15, r14, r13, r12, rbx, rbp and the address to return to. There rsp is a multiple of
  // 16, as a call needs it.
  auto** top = reinterpret_cast<void**>(stack + bytes) - 9;
  for (int i = 0; i < 9; ++i) top[i] = nullptr;
  top[2] = reinterpret_cast<void*>(&Fiber::begin);
  top[3] = this;
  top[6] = reinterpret_cast<void*>(&cortexloop_fiber_begin);
  saved_ = top;
}

void Fiber::exchange(Fiber& other) { cortexloop_fiber_switch(&saved_, other.saved_); }

#else

void Fiber::begin(unsigned high, unsigned low) {
  auto* self = reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(std::uint64_t{high} << 32 | low));
  self->entry_(self->argument_);
}

void Fiber::prepare(unsigned char* stack, std::size_t bytes, Entry entry, void* argument) {
  set(stack, bytes, entry, argument);
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  const auto self = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(this));
  makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::begin), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
}

void Fiber::exchange(Fiber& other) { swapcontext(&context_, &other.context_); }

#endif

}  // namespace cortexloop::emulation
