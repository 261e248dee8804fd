// Host side of the lasso: validation and scheduling. The arithmetic is in kernels/lasso.inl.h.
#include "cortexloop/lasso.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "cortexloop/parallel.h"
#include "dispatch.h"

namespace cortexloop {
namespace cpu {
namespace {

Status check(const LassoPathArgs& a) {
  const LassoSets& sets = a.sets;
  const bool columns = sets.gram == nullptr;
  if (sets.n_sets < 0 || sets.features < 1 || a.n_problems < 0 || a.n_penalties < 1 || sets.images < 1) {
    return fail(Status::invalid_argument, "no features, images or penalties, or a negative number of problems or sets");
  }
  if (columns && (sets.columns == nullptr || sets.mask == nullptr || sets.means == nullptr || a.responses == nullptr)) {
    return fail(Status::invalid_argument, "without Gram matrices, columns, mask, means and responses are needed");
  }
  if (!(a.tolerance >= 0.0) || a.max_sweeps < 1) {
    return fail(Status::invalid_argument, "tolerance should be at least 0 and max_sweeps at least 1, got %g and %lld",
                a.tolerance, static_cast<long long>(a.max_sweeps));
  }
  for (std::int64_t i = 0; i < a.n_problems; ++i) {
    if (a.set_of[i] < 0 || a.set_of[i] >= sets.n_sets) {
      return fail(Status::invalid_argument, "set_of[%lld] is %lld, expected 0 to %lld", static_cast<long long>(i),
                  static_cast<long long>(a.set_of[i]), static_cast<long long>(sets.n_sets - 1));
    }
  }
  for (std::int64_t i = 0; i < a.n_problems * a.n_penalties; ++i) {
    if (!(a.penalties[i] > 0.0) || std::isinf(a.penalties[i])) {
      return fail(Status::invalid_argument, "penalties should be positive and finite, got %g", a.penalties[i]);
    }
  }
  return Status::ok;
}

struct LassoJob {
  const LassoPathArgs* args;
  std::atomic<bool> failed{false};
};

void lasso_body(void* argument, RangeSource& ranges) {
  LassoJob& job = *static_cast<LassoJob*>(argument);
  const LassoPathArgs& a = *job.args;
  std::int64_t begin, end;
  std::unique_ptr<double[]> memory;  // made by threads that get work
  double* scratch = nullptr;
  while (ranges.take(begin, end)) {
    if (!memory) {
      const std::int64_t size = kernels().lasso_scratch_doubles(a.sets) + 8;
      memory.reset(new (std::nothrow) double[static_cast<std::size_t>(size)]);
      if (!memory) {
        job.failed.store(true);
        return;
      }
      scratch = memory.get() + (64 - reinterpret_cast<std::uintptr_t>(memory.get()) % 64) / sizeof(double);
    }
    for (std::int64_t i = begin; i < end; ++i) kernels().lasso_problem(a, i, scratch);
  }
}

}  // namespace

Status lasso_path(const LassoPathArgs& args) {
  const Status status = check(args);
  if (status != Status::ok) return status;
  LassoJob job;
  job.args = &args;
  parallel_run(args.n_problems, 1, lasso_body, &job);
  if (!job.failed) return Status::ok;
  return fail(Status::out_of_memory, "no memory for the working sets of a lasso of %lld features",
              static_cast<long long>(args.sets.features));
}

}  // namespace cpu
}  // namespace cortexloop
