// Launches: which blocks run in which order, and what kernels call.
#include <condition_variable>
#include <cstdarg>
#include <map>
#include <mutex>
#include <thread>

#include "block.h"
#include "races.h"
#include "state.h"

uint3 blockDim;
uint3 gridDim;

namespace cortexloop::emulation {
namespace {

constexpr int kMaxThreads = 1024;
constexpr std::size_t kInFlight = 3;  // blocks, where they are interleaved

std::mutex one_launch;
std::map<const void*, int> allowed_shared;

Block& pooled(std::size_t i) {
  static std::vector<std::unique_ptr<Block>> pool;
  while (pool.size() <= i) pool.push_back(std::make_unique<Block>());
  return *pool[i];
}

void enter_block(std::size_t number) {
  const auto n = static_cast<unsigned>(number);
  blockIdx = {n % gridDim.x, n / gridDim.x % gridDim.y, n / gridDim.x / gridDim.y};
  ++settings.blocks;
}

// Several blocks in flight, each on a thread of its own (so that each has its own static shared memory). Only the holder
// of the baton runs; it hands it on at barriers, to whom the schedule's random numbers choose. So blocks draw work,
// count arrivals and read each other's results in an order that changes with the schedule and is the same every time.
class Interleaved {
 public:
  Interleaved(std::size_t n_blocks, std::size_t shared_bytes, const std::function<void()>& body, int schedule)
      : n_blocks_(n_blocks),
        shared_bytes_(shared_bytes),
        body_(body),
        schedule_(schedule) {
    random_ = 2654435761u * static_cast<unsigned>(schedule) | 1u;
  }

  bool run() {
    const std::size_t n = n_blocks_ < kInFlight ? n_blocks_ : kInFlight;
    for (std::size_t i = 0; i < n; ++i) pooled(i);
    running_.assign(n, true);
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < n; ++i) threads.emplace_back([this, i] { work(i); });
    for (std::thread& thread : threads) thread.join();
    return !failed_;
  }

 private:
  void work(std::size_t me) {
    const FaultStack stack;
    Block& block = pooled(me);
    block.activate();
    wait_for_baton(me);
    while (next_ < n_blocks_ && !failed_) {
      enter_block(next_++);
      if (block.run(body_, shared_bytes_, schedule_, [this, me] { return hand_on(me); })) continue;
      if (!failed_) misused = block.error();
      failed_ = true;
    }
    running_[me] = false;
    hand_on(me);
  }

  // Returns once the baton is back, whether the launch goes on; at once, false, for a thread that has ended.
  bool hand_on(std::size_t me) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 17;
    random_ ^= random_ << 5;
    std::size_t to = random_ % running_.size();
    for (std::size_t i = 0; i < running_.size() && !running_[to]; ++i) to = (to + 1) % running_.size();
    const bool comes_back = running_[me];
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      holder_ = to;
    }
    changed_.notify_all();
    if (!comes_back) return false;
    wait_for_baton(me);
    return !failed_;
  }

  void wait_for_baton(std::size_t me) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return holder_ == me; });
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t holder_ = 0;

  // Touched by the holder only.
  std::vector<bool> running_;
  std::size_t next_ = 0;
  bool failed_ = false;
  unsigned random_;

  const std::size_t n_blocks_;
  const std::size_t shared_bytes_;
  const std::function<void()>& body_;
  const int schedule_;
};

bool run_in_order(std::size_t n_blocks, std::size_t shared_bytes, const std::function<void()>& body, int schedule) {
  const FaultStack stack;
  Block& block = pooled(0);
  block.activate();
  for (std::size_t i = 0; i < n_blocks; ++i) {
    enter_block(schedule == 1 ? n_blocks - 1 - i : i);
    if (block.run(body, shared_bytes, schedule, nullptr)) continue;
    misused = block.error();
    return false;
  }
  return true;
}

}  // namespace

void collective(Kind kind, std::uint32_t mask, void* operands, Site site) {
  Block& self = Block::active();
  if (kind == Kind::ldmatrix_x4 || kind == Kind::ldmatrix_x4_trans || kind == Kind::ldmatrix_x2) {
    const void* row = static_cast<const LdmatrixOperands*>(operands)->row;
    const bool read = kind != Kind::ldmatrix_x2 || threadIdx.x % kWarp < 16;
    if (read && reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
      self.stop(format("%s at %s: the address of a row is not a multiple of 16", name_of(kind), place(site).c_str()));
    }
    if (read && !self.in_shared(row, 16)) {
      self.stop(format("%s at %s: a row is not inside dynamic shared memory", name_of(kind), place(site).c_str()));
    }
    if (read) races::touch(row, 16, races::Kind::load, __builtin_return_address(0));
  }
  self.wait(kind, mask, operands, site);
}

void fence() { races::fence(); }
void atomic(const void* address) { races::atomic(address); }
void load_constant(const void* address, std::size_t bytes, const void* from) {
  races::touch(address, bytes, races::Kind::constant_load, from);
}

unsigned char* dynamic_shared() { return Block::active().shared(); }

void copy_async(void* shared, const void* global, int bytes, int valid) {
  Block& self = Block::active();
  const auto size = static_cast<std::size_t>(bytes);
  if (reinterpret_cast<std::uintptr_t>(shared) % size != 0 || reinterpret_cast<std::uintptr_t>(global) % size != 0) {
    self.stop(format("copy_async_%d: an address is not a multiple of %d", bytes, bytes));
  }
  if (!self.in_shared(shared, size)) {
    self.stop(format("copy_async_%d: the target is not inside dynamic shared memory", bytes));
  }
  if (valid < 0 || valid > bytes) {
    self.stop(format("copy_async_%d: %d valid bytes, 0 to %d expected", bytes, valid, bytes));
  }
  races::copy_begins(shared, size, __builtin_return_address(0));
  self.thread().open_copies.push_back({shared, global, bytes, valid});
}

void copy_async_commit() {
  Thread& thread = Block::active().thread();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

// Copies happen only here, as late as hardware may do them.
void copy_async_wait(int pending) {
  auto& groups = Block::active().thread().copy_groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      const auto size = static_cast<std::size_t>(copy.bytes);
      races::copy_ends(copy.shared, size);
      races::touch(copy.shared, size, races::Kind::store, __builtin_return_address(0));
      races::touch(copy.global, static_cast<std::size_t>(copy.valid), races::Kind::load, __builtin_return_address(0));
      std::memset(copy.shared, 0, size);
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
  Block::active().stop(buffer);
}

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
  const std::size_t limit = allowed == allowed_shared.end() ? 48 * 1024 : static_cast<std::size_t>(allowed->second);
  if (shared_bytes > limit) return failed(cudaErrorInvalidValue);
  const FaultHandler handler;
  races::launch_begins();
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {threads.x, threads.y, threads.z};
  const auto schedule = static_cast<int>(settings.schedule);
  const std::size_t n_blocks = std::size_t{grid.x} * grid.y * grid.z;
  const bool good = schedule > 1 && n_blocks > 1 ? Interleaved(n_blocks, shared_bytes, body, schedule).run()
                                                 : run_in_order(n_blocks, shared_bytes, body, schedule);
  return good ? cudaSuccess : failed(cudaErrorLaunchFailure);
}

}  // namespace cortexloop::emulation
