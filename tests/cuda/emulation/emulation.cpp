// Fibers, blocks, warp collectives and the runtime API of the emulation; see emulation.h.
#include "emulation.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "fiber.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cortexloop::emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr std::uint32_t kAll = ~0u;

// What tests set and read by name, through cortexloop_emulation_set and _get.
struct Settings {
  long long devices = 1;
  long long driver = 13000;  // 0: no driver
  long long multiprocessors = 2;
  long long shared_memory = 227 * 1024;  // most that a block may ask for
  long long major = 9;
  long long minor = 0;
  long long l2 = 50 << 20;
  long long memory = 8LL << 30;
  long long free_memory = 6LL << 30;
  long long schedule = 0;
  long long fail_launch = 0;  // the next launch fails with this error, and this becomes 0
  long long launches = 0;     // counters, from here on
  long long blocks = 0;
  long long matrix_instructions = 0;
} settings;

long long* setting(const std::string& name) {
  static const std::map<std::string, long long*> by_name = {
      {"devices", &settings.devices},
      {"driver", &settings.driver},
      {"multiprocessors", &settings.multiprocessors},
      {"shared_memory", &settings.shared_memory},
      {"major", &settings.major},
      {"minor", &settings.minor},
      {"l2", &settings.l2},
      {"memory", &settings.memory},
      {"free_memory", &settings.free_memory},
      {"schedule", &settings.schedule},
      {"fail_launch", &settings.fail_launch},
      {"launches", &settings.launches},
      {"blocks", &settings.blocks},
      {"matrix_instructions", &settings.matrix_instructions},
  };
  const auto found = by_name.find(name);
  return found == by_name.end() ? nullptr : found->second;
}

std::mutex one_launch;
std::string misused;  // the text of cudaErrorLaunchFailure
cudaError_t last_error = cudaSuccess;
int current_device = 0;
std::map<const void*, int> allowed_shared;

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

const char* name_of(Kind kind) {
  constexpr const char* names[] = {"__syncthreads",     "__syncwarp",        "__shfl_sync",   "__shfl_xor_sync",
                                   "__shfl_down_sync",  "__shfl_up_sync",    "__ballot_sync", "__reduce_max_sync",
                                   "__reduce_min_sync", "__reduce_add_sync", "mma_16816",     "ldmatrix_x4",
                                   "ldmatrix_x4_trans", "ldmatrix_x2"};
  return names[static_cast<int>(kind)];
}

bool aligned_instruction(Kind kind) { return kind >= Kind::mma_16816; }

// Memory whose end touches a page that cannot be accessed.
class GuardedMemory {
 public:
  GuardedMemory() = default;
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }
  void reserve(std::size_t bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    capacity_ = (bytes + page - 1) / page * page;
    mapped_ = capacity_ + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(memory);
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + capacity_, page, PROT_NONE);
    begin_ = base_ + page;
  }
  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + capacity_; }
  std::size_t size() const { return capacity_; }
  bool guards(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= base_ && byte < base_ + mapped_ && (byte < begin() || byte >= end());
  }

 private:
  unsigned char* base_ = nullptr;
  unsigned char* begin_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t mapped_ = 0;
};

enum class State { ready, waiting, finished };

struct Copy {
  void* shared;
  const void* global;
  int valid;
};

struct Thread {
  Fiber fiber;
  GuardedMemory stack;
  uint3 index;
  State state;
  Kind kind;
  std::uint32_t mask;
  void* operands;
  Site site;
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;
};

// One block in flight; blocks follow each other, and the threads' stacks are kept.
class Block {
 public:
  Block() { shared_.reserve(256 * 1024); }

  bool run(const std::function<void()>& body, std::size_t shared_bytes, int schedule);

  // Called from a fiber.
  void wait(Kind kind, std::uint32_t mask, void* operands, Site site);
  [[noreturn]] void stop(const std::string& what);
  unsigned char* shared() const { return shared_begin_; }
  Thread& thread() { return *threads_[static_cast<std::size_t>(current_)]; }
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
  void execute(Kind kind, Thread* const* lanes, std::uint32_t mask);
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

 public:
  static void on_fault(int signal, siginfo_t* info, void* context);
};

Block& block() {
  static Block instance;
  return instance;
}

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

std::string place(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return format("%s:%d", slash == nullptr ? site.file : slash + 1, site.line);
}

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
  self.operands = operands;
  self.site = site;
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
  Thread* lanes[kWarp] = {};
  std::uint32_t waiting = 0;
  for (int lane = 0; lane < kWarp && warp * kWarp + lane < n_threads_; ++lane) {
    Thread& thread = *threads_[static_cast<std::size_t>(warp * kWarp + lane)];
    lanes[lane] = &thread;
    if (thread.state == State::waiting && thread.kind != Kind::barrier) waiting |= 1u << lane;
  }
  bool resolved = false;
  while (waiting != 0) {
    const Thread& first = *lanes[__builtin_ctz(waiting)];
    std::uint32_t same = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      const bool arrived = (waiting & first.mask) >> lane & 1u;
      if (!arrived || lanes[lane]->kind != first.kind || lanes[lane]->mask != first.mask) continue;
      if (aligned_instruction(first.kind) &&
          (lanes[lane]->site.line != first.site.line || std::strcmp(lanes[lane]->site.file, first.site.file) != 0)) {
        continue;
      }
      same |= 1u << lane;
    }
    waiting &= ~same;
    if (same != first.mask) continue;
    execute(first.kind, lanes, same);
    if (!error_.empty()) return true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (same >> lane & 1u) lanes[lane]->state = State::ready;
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
    const int predicate = static_cast<BarrierOperands*>(thread.operands)->predicate != 0;
    any |= predicate;
    all &= predicate;
    count += predicate;
  }
  for (int i = 0; i < n_threads_; ++i) {
    Thread& thread = *threads_[static_cast<std::size_t>(i)];
    auto& operands = *static_cast<BarrierOperands*>(thread.operands);
    operands.predicate = operands.vote == Vote::any ? any : operands.vote == Vote::all ? all : count;
    thread.state = State::ready;
  }
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
                ? format("wait in %s at %s", name_of(thread.kind), place(thread.site).c_str())
                : format("wait in %s (mask %08x) at %s", name_of(thread.kind), thread.mask, place(thread.site).c_str());
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

// --- Warp operations -------------------------------------------------------------------------------------------------

std::uint16_t half_bits(std::uint32_t pair, int i) { return static_cast<std::uint16_t>(pair >> (16 * i)); }

void matrix_product(Thread* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operands = *static_cast<const MmaOperands*>(lanes[lane]->operands);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r)
        a[g + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = half_to_float(half_bits(operands.a[r], i));
      for (int r = 0; r < 2; ++r) b[2 * t + i + 8 * r][g] = half_to_float(half_bits(operands.b[r], i));
      for (int r = 0; r < 2; ++r) d[g + 8 * r][2 * t + i] = operands.d[2 * r + i];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];  // the product of two halves is exact
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operands = *static_cast<const MmaOperands*>(lanes[lane]->operands);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) operands.d[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
  ++settings.matrix_instructions;
}

void load_matrices(Thread* const* lanes, int count, bool transposed) {
  for (int m = 0; m < count; ++m) {
    std::uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(matrix[row], static_cast<const LdmatrixOperands*>(lanes[8 * m + row]->operands)->row, 16);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const std::uint32_t low = transposed ? matrix[t][g] : matrix[g][t];
      const std::uint32_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<const LdmatrixOperands*>(lanes[lane]->operands)->r[m] = high << 16 | low;
    }
  }
}

void shuffle_values(Kind kind, Thread* const* lanes, std::uint32_t mask, std::string* error) {
  std::uint32_t values[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1u) values[lane] = static_cast<const ShuffleOperands*>(lanes[lane]->operands)->value;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    auto& operands = *static_cast<ShuffleOperands*>(lanes[lane]->operands);
    const int begin = lane / operands.width * operands.width;
    const int end = begin + operands.width;
    int source = lane;
    switch (kind) {
      case Kind::shuffle: source = begin + (operands.other & (operands.width - 1)); break;
      case Kind::shuffle_xor: source = (lane ^ operands.other) < end ? lane ^ operands.other : lane; break;
      case Kind::shuffle_down: source = lane + operands.other < end ? lane + operands.other : lane; break;
      default: source = lane - operands.other >= begin ? lane - operands.other : lane; break;
    }
    if ((mask >> source & 1u) == 0) {
      *error = format("%s at %s reads lane %d, which its mask %08x leaves out", name_of(kind),
                      place(lanes[lane]->site).c_str(), source, mask);
      return;
    }
    operands.value = values[source];
  }
}

void reduce_values(Kind kind, Thread* const* lanes, std::uint32_t mask) {
  std::uint32_t result = kind == Kind::reduce_min ? kAll : 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const std::uint32_t value = *static_cast<const std::uint32_t*>(lanes[lane]->operands);
    switch (kind) {
      case Kind::ballot: result |= value << lane; break;
      case Kind::reduce_max: result = max(result, value); break;
      case Kind::reduce_min: result = min(result, value); break;
      default: result += value; break;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1u) *static_cast<std::uint32_t*>(lanes[lane]->operands) = result;
  }
}

void Block::execute(Kind kind, Thread* const* lanes, std::uint32_t mask) {
  switch (kind) {
    case Kind::barrier:
    case Kind::syncwarp: break;
    case Kind::shuffle:
    case Kind::shuffle_xor:
    case Kind::shuffle_down:
    case Kind::shuffle_up: shuffle_values(kind, lanes, mask, &error_); break;
    case Kind::ballot:
    case Kind::reduce_max:
    case Kind::reduce_min:
    case Kind::reduce_add: reduce_values(kind, lanes, mask); break;
    case Kind::mma_16816: matrix_product(lanes); break;
    case Kind::ldmatrix_x4: load_matrices(lanes, 4, false); break;
    case Kind::ldmatrix_x4_trans: load_matrices(lanes, 4, true); break;
    case Kind::ldmatrix_x2: load_matrices(lanes, 2, false); break;
  }
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
  Block& self = block();
  if (self.current_ < 0) {  // not a kernel's fault: as if there were no handler
    std::signal(signal, SIG_DFL);
    return;
  }
  self.describe_fault(static_cast<const unsigned char*>(info->si_addr));
  siglongjmp(self.fault_, 1);
}

// Turns a kernel's invalid access into a failed launch. AddressSanitizer reports it better, and ends the process.
class FaultHandler {
 public:
#if defined(__SANITIZE_ADDRESS__)
  FaultHandler() {}
#else
  FaultHandler() : stack_(64 * 1024) {
    stack_t own = {};
    own.ss_sp = stack_.data();
    own.ss_size = stack_.size();
    sigaltstack(&own, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = &Block::on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv_before_);
    sigaction(SIGBUS, &action, &bus_before_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_before_, nullptr);
    sigaction(SIGBUS, &bus_before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  std::vector<unsigned char> stack_;
  stack_t stack_before_ = {};
  struct sigaction segv_before_ = {};
  struct sigaction bus_before_ = {};
#endif
};

// --- Blocks ----------------------------------------------------------------------------------------------------------

bool Block::run(const std::function<void()>& body, std::size_t shared_bytes, int schedule) {
  schedule_ = schedule;
  state_ = 2654435761u * static_cast<unsigned>(schedule + 1) | 1u;
  body_ = &body;
  error_.clear();
  start(static_cast<int>(blockDim.x * blockDim.y * blockDim.z));
  fill_shared(shared_bytes);
  const int n_warps = (n_threads_ + kWarp - 1) / kWarp;
  if (sigsetjmp(fault_, 1) != 0) {
    current_ = -1;
    misused = error_;
    return false;
  }
  for (;;) {
    bool happened = false;
    const int turn = schedule > 1 ? static_cast<int>(random() % static_cast<unsigned>(n_warps)) : 0;
    for (int i = 0; i < n_warps && error_.empty(); ++i) {
      happened |= step((ordered(i, n_warps) + turn) % n_warps, schedule <= 1);
    }
    if (!error_.empty()) break;
    if (happened || release_barrier()) continue;
    for (int i = 0; i < n_threads_; ++i) {
      if (threads_[static_cast<std::size_t>(i)]->state != State::finished) {
        report_stuck();
        break;
      }
    }
    if (error_.empty()) check_margin();
    break;
  }
  if (!error_.empty()) misused = error_;
  return error_.empty();
}

}  // namespace

void collective(Kind kind, std::uint32_t mask, void* operands, Site site) {
  Block& self = block();
  if (kind == Kind::ldmatrix_x4 || kind == Kind::ldmatrix_x4_trans || kind == Kind::ldmatrix_x2) {
    const void* row = static_cast<const LdmatrixOperands*>(operands)->row;
    const bool read = kind != Kind::ldmatrix_x2 || threadIdx.x % kWarp < 16;
    if (read && reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
      self.stop(format("%s at %s: the address of a row is not a multiple of 16", name_of(kind), place(site).c_str()));
    }
    if (read && !self.in_shared(row, 16)) {
      self.stop(format("%s at %s: a row is not inside dynamic shared memory", name_of(kind), place(site).c_str()));
    }
  }
  self.wait(kind, mask, operands, site);
}

unsigned char* dynamic_shared() { return block().shared(); }

void copy_async(void* shared, const void* global, int valid) {
  Block& self = block();
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    self.stop("copy_async_16: an address is not a multiple of 16");
  }
  if (!self.in_shared(shared, 16)) self.stop("copy_async_16: the target is not inside dynamic shared memory");
  if (valid < 0 || valid > 16) self.stop(format("copy_async_16: %d valid bytes, 0 to 16 expected", valid));
  self.thread().open_copies.push_back({shared, global, valid});
}

void copy_async_commit() {
  Thread& thread = block().thread();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

// Copies happen only here, as late as hardware may do them.
void copy_async_wait(int pending) {
  auto& groups = block().thread().copy_groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.shared, 0, 16);
      std::memcpy(copy.shared, copy.global, static_cast<std::size_t>(copy.valid));
    }
    groups.erase(groups.begin());
  }
}

void misuse(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  block().stop(buffer);
}

void set_schedule(int schedule) { settings.schedule = schedule; }

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > settings.shared_memory) return failed(cudaErrorInvalidValue);
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const void* kernel, dim3 grid, dim3 threads, std::size_t shared_bytes,
                const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  ++settings.launches;
  if (settings.fail_launch != 0) {
    misused = "a failure asked for by the test";
    return failed(static_cast<cudaError_t>(std::exchange(settings.fail_launch, 0)));
  }
  const std::size_t n_threads = std::size_t{threads.x} * threads.y * threads.z;
  if (n_threads == 0 || n_threads > kMaxThreads || threads.z > 64 || grid.x == 0 || grid.x > INT_MAX || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return failed(cudaErrorInvalidConfiguration);
  }
  const auto allowed = allowed_shared.find(kernel);
  if (shared_bytes > 48 * 1024 &&
      (allowed == allowed_shared.end() || static_cast<int>(shared_bytes) > allowed->second)) {
    return failed(cudaErrorInvalidValue);
  }
  const FaultHandler handler;
  gridDim = grid;
  blockDim = threads;
  const auto schedule = static_cast<int>(settings.schedule);
  const std::size_t n_blocks = std::size_t{grid.x} * grid.y * grid.z;
  for (std::size_t i = 0; i < n_blocks; ++i) {
    const std::size_t b = schedule == 1 ? n_blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    ++settings.blocks;
    if (!block().run(body, shared_bytes, schedule)) return failed(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

}  // namespace cortexloop::emulation

using cortexloop::emulation::current_device;
using cortexloop::emulation::failed;
using cortexloop::emulation::settings;

unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 0xfu;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7u))) & 0xffu;
    if (choice & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

// --- Runtime API -----------------------------------------------------------------------------------------------------

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorLaunchFailure: return cortexloop::emulation::misused.c_str();
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(cortexloop::emulation::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return cortexloop::emulation::last_error; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = static_cast<int>(settings.driver);
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings.driver == 0 ? 0 : static_cast<int>(settings.devices);
  if (settings.driver == 0) return failed(cudaErrorInsufficientDriver);
  return *count == 0 ? failed(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings.devices) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= settings.devices) return failed(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = static_cast<int>(settings.multiprocessors); break;
    case cudaDevAttrL2CacheSize: *value = static_cast<int>(settings.l2); break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = static_cast<int>(settings.major); break;
    case cudaDevAttrComputeCapabilityMinor: *value = static_cast<int>(settings.minor); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(settings.shared_memory) + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(settings.shared_memory); break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    default: return failed(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= settings.devices) return failed(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "emulated device");
  const auto shared = static_cast<std::size_t>(settings.shared_memory);
  properties->totalGlobalMem = static_cast<std::size_t>(settings.memory);
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = shared;
  properties->sharedMemPerMultiprocessor = shared + 1024;
  properties->reservedSharedMemPerBlock = 1024;
  properties->major = static_cast<int>(settings.major);
  properties->minor = static_cast<int>(settings.minor);
  properties->multiProcessorCount = static_cast<int>(settings.multiprocessors);
  properties->l2CacheSize = static_cast<int>(settings.l2);
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  *free_bytes = static_cast<std::size_t>(settings.free_memory);
  *total_bytes = static_cast<std::size_t>(settings.memory);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  *pointer = std::malloc(bytes);
  return *pointer == nullptr ? failed(cudaErrorMemoryAllocation) : cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// --- For tests, through ctypes ---------------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) int cortexloop_emulation_set(const char* name, long long value) {
  long long* const found = cortexloop::emulation::setting(name);
  if (found != nullptr) *found = value;
  return found != nullptr;
}

extern "C" __attribute__((visibility("default"))) long long cortexloop_emulation_get(const char* name) {
  const long long* const found = cortexloop::emulation::setting(name);
  return found != nullptr ? *found : -1;
}
