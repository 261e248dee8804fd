#include "block.h"

#include "races.h"
#include "state.h"

thread_local uint3 threadIdx;
thread_local uint3 blockIdx;

namespace cortexloop::emulation {
namespace {

constexpr std::uint32_t kAll = ~0u;
thread_local Block* active_block = nullptr;

bool aligned_instruction(Kind kind) { return kind >= Kind::mma_16816; }

bool same_place(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

}  // namespace

Block& Block::active() { return *active_block; }
void Block::activate() { active_block = this; }
bool Block::in_kernel() { return active_block != nullptr && active_block->current_ >= 0; }

// --- Threads of a block ----------------------------------------------------------------------------------------------

void Block::enter(void* self) {
  auto* block = static_cast<Block*>(self);
  block->thread().fiber.entered();
  (*block->body_)();
  block->thread().state = State::finished;
  block->thread().fiber.leave_for(block->scheduler_);
}

void Block::start(int n_threads) {
  n_threads_ = n_threads;
  while (static_cast<int>(threads_.size()) < n_threads) {
    threads_.push_back(std::make_unique<Thread>());
    threads_.back()->stack.reserve(kFiberStack);
  }
  for (int i = 0; i < n_threads; ++i) {
    Thread& thread = *threads_[static_cast<std::size_t>(i)];
    const auto x = static_cast<unsigned>(i);
    thread.index = {x % blockDim.x, x / blockDim.x % blockDim.y, x / blockDim.x / blockDim.y};
    thread.state = State::ready;
    thread.open_copies.clear();
    thread.copy_groups.clear();
    thread.fiber.prepare(thread.stack.begin(), thread.stack.size(), &Block::enter, this);
  }
}

void Block::resume(int thread) {
  current_ = thread;
  threadIdx = this->thread().index;
  scheduler_.switch_to(this->thread().fiber);
  current_ = -1;
}

void Block::wait(Kind kind, std::uint32_t mask, void* operands, Site site) {
  Thread& self = thread();
  self.kind = kind;
  self.mask = mask;
  self.arrival = {operands, site};
  self.state = State::waiting;
  if (kind != Kind::barrier && (mask >> (current_ % kWarp) & 1u) == 0) {
    stop(format("%s at %s leaves the calling lane out of its mask %08x", name_of(kind), place(site).c_str(), mask));
  }
  self.fiber.switch_to(scheduler_);
}

void Block::stop(const std::string& what) {
  if (error_.empty()) {
    error_ = what + format(" [block (%u, %u, %u), thread %d]", blockIdx.x, blockIdx.y, blockIdx.z, current_);
  }
  thread().fiber.leave_for(scheduler_);
}

// Runs the lanes of one warp until they wait or end, and does the operations for which all lanes have arrived.
// Returns whether anything happened.
bool Block::step(int warp, bool to_the_end) {
  const int first = warp * kWarp;
  const int n = n_threads_ - first < kWarp ? n_threads_ - first : kWarp;
  bool happened = false;
  for (;;) {
    const int turn = schedule_ > 1 ? static_cast<int>(random() % static_cast<unsigned>(n)) : 0;
    for (int i = 0; i < n; ++i) {
      const int lane = (ordered(i, n) + turn) % n;
      if (threads_[static_cast<std::size_t>(first + lane)]->state != State::ready) continue;
      resume(first + lane);
      if (!error_.empty()) return true;
      happened = true;
    }
    if (!resolve(warp)) return happened;
    if (!error_.empty() || !to_the_end) return true;
  }
}

bool Block::resolve(int warp) {
  Thread* threads[kWarp] = {};
  Lanes lanes = {};
  std::uint32_t waiting = 0;
  for (int lane = 0; lane < kWarp && warp * kWarp + lane < n_threads_; ++lane) {
    Thread& thread = *threads_[static_cast<std::size_t>(warp * kWarp + lane)];
    threads[lane] = &thread;
    lanes[static_cast<std::size_t>(lane)] = thread.arrival;
    if (thread.state == State::waiting && thread.kind != Kind::barrier) waiting |= 1u << lane;
  }
  bool resolved = false;
  while (waiting != 0) {
    const Thread& first = *threads[__builtin_ctz(waiting)];
    std::uint32_t same = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      const bool arrived = (waiting & first.mask) >> lane & 1u;
      if (!arrived || threads[lane]->kind != first.kind || threads[lane]->mask != first.mask) continue;
      if (aligned_instruction(first.kind) && !same_place(threads[lane]->arrival.site, first.arrival.site)) { continue; }
      same |= 1u << lane;
    }
    waiting &= ~same;
    if (same != first.mask) continue;
    execute(first.kind, same, lanes, &error_);
    if (first.kind == Kind::syncwarp) races::warp_synced(warp);
    if (!error_.empty()) return true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (same >> lane & 1u) threads[lane]->state = State::ready;
    }
    resolved = true;
  }
  return resolved;
}

bool Block::release_barrier() {
  int any = 0, all = 1, count = 0;
  for (int i = 0; i < n_threads_; ++i) {
    const Thread& thread = *threads_[static_cast<std::size_t>(i)];
    if (thread.state != State::waiting || thread.kind != Kind::barrier) return false;
    const int predicate = static_cast<BarrierOperands*>(thread.arrival.operands)->predicate != 0;
    any |= predicate;
    all &= predicate;
    count += predicate;
  }
  for (int i = 0; i < n_threads_; ++i) {
    Thread& thread = *threads_[static_cast<std::size_t>(i)];
    auto& operands = *static_cast<BarrierOperands*>(thread.arrival.operands);
    operands.predicate = operands.vote == Vote::any ? any : operands.vote == Vote::all ? all : count;
    thread.state = State::ready;
  }
  races::barrier_passed();
  return true;
}

// Says who waits where: ranges of threads in the same situation.
void Block::report_stuck() {
  std::string where;
  std::string previous;
  int begin = 0;
  int listed = 0;
  for (int i = 0; i <= n_threads_; ++i) {
    std::string now;
    if (i < n_threads_) {
      const Thread& thread = *threads_[static_cast<std::size_t>(i)];
      now = thread.state == State::finished ? "have returned"
            : thread.kind == Kind::barrier || thread.mask == kAll
                ? format("wait in %s at %s", name_of(thread.kind), place(thread.arrival.site).c_str())
                : format("wait in %s (mask %08x) at %s", name_of(thread.kind), thread.mask,
                         place(thread.arrival.site).c_str());
    }
    if (i > 0 && now != previous) {
      if (++listed <= 6) where += format("%s%d to %d %s", where.empty() ? "" : "; ", begin, i - 1, previous.c_str());
      begin = i;
    }
    previous = now;
  }
  error_ = "not all threads arrive: threads " + where + (listed > 6 ? "; ..." : "") +
           format(" [block (%u, %u, %u)]", blockIdx.x, blockIdx.y, blockIdx.z);
}

// --- Shared memory ---------------------------------------------------------------------------------------------------

constexpr unsigned char kMargin = 0xa5;

void Block::fill_shared(std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared_.begin(), shared_.size());
#endif
  // The start is aligned to 128 bytes; what is left of the last page is a margin with a known content.
  shared_bytes_ = bytes;
  shared_begin_ = shared_.end() - (bytes + 127) / 128 * 128;
  // As halves and floats: NaN, then large and positive, then large and negative: max(0, x) swallows some of these.
  constexpr unsigned char garbage[] = {0xff, 0x7b, 0xfb};
  std::memset(shared_begin_, garbage[schedule_ % 3], bytes);
  std::memset(shared_begin_ + bytes, kMargin, static_cast<std::size_t>(shared_.end() - shared_begin_) - bytes);
  // Below the start: a page at most, since a negative index rarely goes further.
  std::memset(shared_begin_ - 4096, kMargin, 4096);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(shared_begin_ + bytes, static_cast<std::size_t>(shared_.end() - shared_begin_) - bytes);
  __asan_poison_memory_region(shared_.begin(), static_cast<std::size_t>(shared_begin_ - shared_.begin()));
#endif
}

void Block::check_margin() {
#if defined(__SANITIZE_ADDRESS__)
  return;  // poisoned instead
#endif
  for (const unsigned char* byte = shared_begin_ + shared_bytes_; byte < shared_.end(); ++byte) {
    if (*byte != kMargin) {
      error_ = format("byte %td was written, past the %zu bytes of dynamic shared memory [block (%u, %u, %u)]",
                      byte - shared_begin_, shared_bytes_, blockIdx.x, blockIdx.y, blockIdx.z);
      return;
    }
  }
  for (const unsigned char* byte = shared_begin_ - 4096; byte < shared_begin_; ++byte) {
    if (*byte != kMargin) {
      error_ = format("byte %td, before dynamic shared memory, was written [block (%u, %u, %u)]", byte - shared_begin_,
                      blockIdx.x, blockIdx.y, blockIdx.z);
      return;
    }
  }
}

// --- Invalid addresses -----------------------------------------------------------------------------------------------

void Block::describe_fault(const unsigned char* address) {
  if (shared_.guards(address)) {
    error_ = format("byte %td of dynamic shared memory was accessed, which has %zu bytes", address - shared_begin_,
                    shared_bytes_);
  } else if (thread().stack.guards(address)) {
    error_ = "the stack of a thread overflowed";
  } else {
    error_ = format("address %p was accessed, which is not mapped or not writable", static_cast<const void*>(address));
  }
  error_ += format(" [block (%u, %u, %u), thread %d]", blockIdx.x, blockIdx.y, blockIdx.z, current_);
}

void Block::on_fault(int signal, siginfo_t* info, void*) {
  Block& self = active();
  if (self.current_ < 0) {  // not a kernel's fault: as if there were no handler
    std::signal(signal, SIG_DFL);
    return;
  }
  self.describe_fault(static_cast<const unsigned char*>(info->si_addr));
  siglongjmp(self.fault_, 1);
}

FaultStack::FaultStack() : stack_(64 * 1024) {
  stack_t own = {};
  own.ss_sp = stack_.data();
  own.ss_size = stack_.size();
  sigaltstack(&own, &before_);
}
FaultStack::~FaultStack() { sigaltstack(&before_, nullptr); }

#if defined(__SANITIZE_ADDRESS__)
FaultHandler::FaultHandler() {}
FaultHandler::~FaultHandler() {}
#else
FaultHandler::FaultHandler() {
  struct sigaction action = {};
  action.sa_sigaction = &Block::on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &segv_before_);
  sigaction(SIGBUS, &action, &bus_before_);
}
FaultHandler::~FaultHandler() {
  sigaction(SIGSEGV, &segv_before_, nullptr);
  sigaction(SIGBUS, &bus_before_, nullptr);
}
#endif

// --- A whole block ---------------------------------------------------------------------------------------------------

bool Block::run(const std::function<void()>& body, std::size_t shared_bytes, int schedule,
                const std::function<bool()>& at_barrier) {
  schedule_ = schedule;
  state_ = 2654435761u * static_cast<unsigned>(schedule + 1) | 1u;
  body_ = &body;
  error_.clear();
  start(static_cast<int>(blockDim.x * blockDim.y * blockDim.z));
  fill_shared(shared_bytes);
  races::block_begins();
  const int n_warps = (n_threads_ + kWarp - 1) / kWarp;
  if (sigsetjmp(fault_, 1) != 0) {
    current_ = -1;
    return false;
  }
  for (;;) {
    bool happened = false;
    const int turn = schedule > 1 ? static_cast<int>(random() % static_cast<unsigned>(n_warps)) : 0;
    for (int i = 0; i < n_warps && error_.empty(); ++i) {
      happened |= step((ordered(i, n_warps) + turn) % n_warps, schedule <= 1);
    }
    if (!error_.empty()) break;
    if (happened) continue;
    if (release_barrier()) {
      if (at_barrier && !at_barrier()) return false;
      continue;
    }
    for (int i = 0; i < n_threads_; ++i) {
      if (threads_[static_cast<std::size_t>(i)]->state != State::finished) {
        report_stuck();
        break;
      }
    }
    if (error_.empty()) check_margin();
    break;
  }
  return error_.empty();
}

}  // namespace cortexloop::emulation
