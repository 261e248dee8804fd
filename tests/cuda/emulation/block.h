// The threads of one block as fibers, and its shared memory.
#pragma once

#include <csetjmp>
#include <csignal>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulation.h"
#include "fiber.h"
#include "guarded_memory.h"
#include "warp.h"

namespace cortexloop::emulation {

enum class State { ready, waiting, finished };

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid;
};

struct Thread {
  Fiber fiber;
  GuardedMemory stack;
  uint3 index;
  State state;
  Kind kind;
  std::uint32_t mask;
  Arrival arrival;
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;
};

// Runs blocks, one after the other; the threads' stacks are kept.
class Block {
 public:
  Block() { shared_.reserve(256 * 1024); }

  // False if something was misused; `error()` says what. `at_barrier`, if not empty, is called whenever all threads have
  // passed a barrier, and returns whether to go on.
  bool run(const std::function<void()>& body, std::size_t shared_bytes, int schedule,
           const std::function<bool()>& at_barrier);
  const std::string& error() const { return error_; }

  // The one that runs on this thread of the operating system.
  static Block& active();
  void activate();
  static bool in_kernel();  // whether a kernel's code is running, on this thread of the operating system

  static void on_fault(int signal, siginfo_t* info, void* context);

  // Called from a fiber.
  void wait(Kind kind, std::uint32_t mask, void* operands, Site site);
  [[noreturn]] void stop(const std::string& what);
  unsigned char* shared() const { return shared_begin_; }
  Thread& thread() { return *threads_[static_cast<std::size_t>(current_)]; }
  int current() const { return current_; }
  bool on_stack(const void* address) { return thread().stack.holds(address); }
  bool in_shared(const void* address, std::size_t bytes) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= shared_begin_ && byte + bytes <= shared_begin_ + shared_bytes_;
  }

 private:
  static void enter(void* block);
  void describe_fault(const unsigned char* address);
  void start(int n_threads);
  void resume(int thread);
  bool step(int warp, bool to_the_end);
  bool resolve(int warp);
  bool release_barrier();
  void report_stuck();
  void fill_shared(std::size_t bytes);
  void check_margin();
  int ordered(int i, int n) const { return schedule_ == 1 ? n - 1 - i : i; }
  std::uint32_t random() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    return state_ ^= state_ << 5;
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  int n_threads_ = 0;
  int current_ = -1;
  Fiber scheduler_;
  const std::function<void()>* body_ = nullptr;
  GuardedMemory shared_;
  unsigned char* shared_begin_ = nullptr;
  std::size_t shared_bytes_ = 0;
  int schedule_ = 0;
  std::uint32_t state_ = 1;
  std::string error_;
  sigjmp_buf fault_;
};

// While it lives, a kernel's invalid access makes its launch fail. AddressSanitizer reports it better, and ends the process.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  struct sigaction segv_before_ = {};
  struct sigaction bus_before_ = {};
};

// The handler's own stack, one for each thread of the operating system.
class FaultStack {
 public:
  FaultStack();
  ~FaultStack();
  FaultStack(const FaultStack&) = delete;
  FaultStack& operator=(const FaultStack&) = delete;

 private:
  std::vector<unsigned char> stack_;
  stack_t before_ = {};
};

}  // namespace cortexloop::emulation
