#include "cortexloop/parallel.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace cortexloop {
namespace {

int default_threads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

// Workers sleep on a condition variable between jobs. A job is a generation number plus the body to call; `running_` counts
// the workers that have not finished it.
class Pool {
 public:
  explicit Pool(int workers) {
    threads_.reserve(static_cast<std::size_t>(workers));
    for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int workers() const { return static_cast<int>(threads_.size()); }

  void run(ParallelBody body, void* argument, RangeSource& ranges) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      argument_ = argument;
      ranges_ = &ranges;
      running_ = workers();
      ++generation_;
    }
    wake_.notify_all();
    body(argument, ranges);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void work() {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      const ParallelBody body = body_;
      void* const argument = argument_;
      RangeSource& ranges = *ranges_;
      lock.unlock();
      body(argument, ranges);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::uint64_t generation_ = 0;
  int running_ = 0;
  bool stop_ = false;
  ParallelBody body_ = nullptr;
  void* argument_ = nullptr;
  RangeSource* ranges_ = nullptr;
};

// Held while a job runs and while the pool changes. Deliberately never destroyed: worker threads may outlive static destruction.
struct Shared {
  std::mutex busy;
  std::atomic<int> count{default_threads()};
  Pool* pool = nullptr;
};

Shared*& shared_slot() {
  static Shared* shared = new Shared;
  return shared;
}

#if !defined(_WIN32)
// A child made by fork has no worker threads and may have inherited a locked mutex: it starts afresh and leaks the old state.
void start_afresh() {
  const int count = shared_slot()->count.load();
  shared_slot() = new Shared;
  shared_slot()->count = count;
}
#endif

Shared& shared() {
#if !defined(_WIN32)
  static const int registered = pthread_atfork(nullptr, nullptr, start_afresh);
  static_cast<void>(registered);
#endif
  return *shared_slot();
}

thread_local bool inside = false;

}  // namespace

int num_threads() { return shared().count.load(); }

void set_num_threads(int count) { shared().count = std::max(1, count); }

void parallel_run(std::int64_t total, std::int64_t chunk, ParallelBody body, void* argument) {
  if (total <= 0) return;
  RangeSource ranges(total, std::max<std::int64_t>(1, chunk));
  Shared& state = shared();
  const int wanted = state.count.load();
  std::unique_lock<std::mutex> lock(state.busy, std::defer_lock);
  if (wanted == 1 || total <= chunk || inside || !lock.try_lock()) {
    body(argument, ranges);
    return;
  }
  if (state.pool == nullptr || state.pool->workers() != wanted - 1) {
    delete state.pool;
    state.pool = new Pool(wanted - 1);
  }
  inside = true;
  state.pool->run(body, argument, ranges);
  inside = false;
}

}  // namespace cortexloop
