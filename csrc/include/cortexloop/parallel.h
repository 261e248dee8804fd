// One thread pool per process. Whichever thread calls works too; a concurrent or nested call runs serially in its caller.
#pragma once

#include <atomic>
#include <cstdint>

namespace cortexloop {

// Hands out consecutive ranges of [0, total) to whoever asks. Results must not depend on who takes what.
class RangeSource {
 public:
  RangeSource(std::int64_t total, std::int64_t chunk) : total_(total), chunk_(chunk) {}

  bool take(std::int64_t& begin, std::int64_t& end) {
    begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
    if (begin >= total_) return false;
    end = begin + chunk_ < total_ ? begin + chunk_ : total_;
    return true;
  }

 private:
  const std::int64_t total_;
  const std::int64_t chunk_;
  std::atomic<std::int64_t> next_{0};
};

using ParallelBody = void (*)(void* argument, RangeSource& ranges);

// Call `body(argument, ranges)` on up to num_threads() threads, each taking ranges until none is left. Returns when all are done.
void parallel_run(std::int64_t total, std::int64_t chunk, ParallelBody body, void* argument);

int num_threads();
void set_num_threads(int count);  // at least 1

}  // namespace cortexloop
