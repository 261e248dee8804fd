// Host side of the non-negative factorization: validation and scheduling. The arithmetic is in kernels/nmf.inl.h.
#include "cortexloop/nmf.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "cortexloop/parallel.h"
#include "dispatch.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr std::int64_t kMaxFloats = std::int64_t{1} << 40;

bool weight(float x) { return std::isfinite(x) && x >= 0.0f; }

Status check(const NmfArgs& a) {
  if (a.problems < 0 || a.rows < 1 || a.columns < 1 || a.rank < 1) {
    return fail(Status::invalid_argument, "rows, columns and rank should each be at least 1, and problems at least 0");
  }
  if (a.columns > kMaxFloats / (2 * a.rank) || a.columns > kMaxFloats / a.rows || a.rank > kMaxFloats / a.rows) {
    return fail(Status::invalid_argument, "a matrix and its factors may have 2^40 entries each");
  }
  if (!weight(a.l1_w) || !weight(a.l2_w) || !weight(a.l1_h) || !weight(a.l2_h) || !weight(a.tolerance)) {
    return fail(Status::invalid_argument, "penalties and tolerance should be finite and at least 0");
  }
  if (a.max_iterations < 1) return fail(Status::invalid_argument, "max_iterations should be at least 1");
  return Status::ok;
}

struct NmfJob {
  const NmfArgs* args;
  std::atomic<bool> failed{false};
};

void nmf_body(void* argument, RangeSource& ranges) {
  NmfJob& job = *static_cast<NmfJob*>(argument);
  std::int64_t begin, end;
  std::unique_ptr<float[]> scratch;  // made by threads that get work
  while (ranges.take(begin, end)) {
    if (!scratch) {
      scratch.reset(new (std::nothrow) float[static_cast<std::size_t>(kernels().nmf_scratch_floats(*job.args))]);
      if (!scratch) {
        job.failed.store(true);
        return;
      }
    }
    for (std::int64_t i = begin; i < end; ++i) kernels().nmf_problem(*job.args, i, scratch.get());
  }
}

}  // namespace

Status nmf(const NmfArgs& args) {
  const Status status = check(args);
  if (status != Status::ok) return status;
  NmfJob job;
  job.args = &args;
  parallel_run(args.problems, 1, nmf_body, &job);
  if (!job.failed) return Status::ok;
  return fail(Status::out_of_memory, "no memory for a copy of a matrix of %lld x %lld",
              static_cast<long long>(args.rows), static_cast<long long>(args.columns));
}

}  // namespace cpu
}  // namespace cortexloop
