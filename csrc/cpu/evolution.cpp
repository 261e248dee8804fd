// Host side of the evolution operators: validation and scheduling. The arithmetic is in kernels/evolution.inl.h.
#include "cortexloop/evolution.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "cortexloop/parallel.h"
#include "dispatch.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr std::int64_t kMaxRank = 1 << 20;
constexpr std::int64_t kMomentsColumns = 1024;  // 4 KB of each row at a time: the sums stay in the first-level cache

// Rows that a thread takes at a time: enough numbers to be worth waking one for.
std::int64_t rows_at_a_time(std::int64_t columns) { return std::max<std::int64_t>(1, 8192 / columns); }

Status check(const RandomRows& random) {
  if (random.n_problems < 0 || random.rows < 0 || random.columns < 1) {
    return fail(Status::invalid_argument, "negative problems or rows, or no columns");
  }
  if (random.stream > 255 || random.rows > 0xffffff || random.columns > (std::int64_t{1} << 34)) {
    return fail(Status::invalid_argument, "stream should be below 256, rows below 2^24, columns at most 2^34");
  }
  for (std::int64_t p = 0; p < random.n_problems; ++p) {
    if (random.problems[p] < 0 || random.problems[p] > 0xffffffffLL) {
      return fail(Status::invalid_argument, "problems[%lld] is %lld, expected 0 to 2^32 - 1", static_cast<long long>(p),
                  static_cast<long long>(random.problems[p]));
    }
  }
  return Status::ok;
}

Status check(const LowRank& factors) {
  if (factors.rank < 0 || factors.rank > kMaxRank) {
    return fail(Status::invalid_argument, "rank should be 0 to 2^20, got %lld", static_cast<long long>(factors.rank));
  }
  return Status::ok;
}

LowRank of_problem(const LowRank& factors, std::int64_t problem, std::int64_t columns) {
  const std::int64_t offset = problem * factors.rank * columns;
  return factors.rank == 0 ? LowRank{nullptr, nullptr, 0}
                           : LowRank{factors.left + offset, factors.right + offset, factors.rank};
}

RandomRow row_of(const RandomRows& random, std::int64_t problem, std::int64_t row) {
  return {static_cast<std::uint32_t>(random.seed), static_cast<std::uint32_t>(random.seed >> 32),
          random.stream << 24 | static_cast<std::uint32_t>(row), random.step,
          static_cast<std::uint32_t>(random.problems[problem])};
}

struct RandomJob {
  const RandomRows* random;
  bool normal;
  float* out;
};

void random_body(void* argument, RangeSource& ranges) {
  const RandomJob& job = *static_cast<RandomJob*>(argument);
  const RandomRows& random = *job.random;
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      kernels().random_row(row_of(random, unit / random.rows, unit % random.rows), job.normal, random.columns,
                           job.out + unit * random.columns);
    }
  }
}

Status random_rows(const RandomRows& random, bool normal, float* out) {
  const Status status = check(random);
  if (status != Status::ok) return status;
  RandomJob job{&random, normal, out};
  parallel_run(random.n_problems * random.rows, rows_at_a_time(random.columns), random_body, &job);
  return Status::ok;
}

// `rank` numbers of scratch, or null without memory.
std::unique_ptr<float[]> room_for_dots(std::int64_t rank) {
  return std::unique_ptr<float[]>(new (std::nothrow) float[static_cast<std::size_t>(std::max<std::int64_t>(1, rank))]);
}

Status no_memory(std::int64_t rank) {
  return fail(Status::out_of_memory, "no memory for %lld products per thread", static_cast<long long>(rank));
}

struct SampleJob {
  const SampleArgs* args;
  std::atomic<bool> failed{false};
};

void sample_body(void* argument, RangeSource& ranges) {
  SampleJob& job = *static_cast<SampleJob*>(argument);
  const SampleArgs& a = *job.args;
  const std::unique_ptr<float[]> dots = room_for_dots(a.factors.rank);
  if (!dots) {
    job.failed.store(true);
    return;
  }
  const std::int64_t columns = a.random.columns;
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t p = unit / a.random.rows;
      kernels().sample_row(row_of(a.random, p, unit % a.random.rows), a.mean + p * columns, a.scale[p],
                           a.diagonal == nullptr ? nullptr : a.diagonal + p * columns,
                           of_problem(a.factors, p, columns), columns, dots.get(), a.out + unit * columns);
    }
  }
}

void moments_body(void* argument, RangeSource& ranges) {
  const MomentsArgs& a = *static_cast<const MomentsArgs*>(argument);
  const std::int64_t blocks = (a.columns + kMomentsColumns - 1) / kMomentsColumns;
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t p = unit / blocks, column = unit % blocks * kMomentsColumns;
      const std::int64_t at = p * a.columns + column;
      kernels().moments_block(a.codes + p * a.rows * a.columns + column, a.weights + p * a.rows,
                              a.centre == nullptr ? nullptr : a.centre + at, a.rows, a.columns,
                              std::min(kMomentsColumns, a.columns - column), a.first + at,
                              a.second == nullptr ? nullptr : a.second + at);
    }
  }
}

struct LowRankJob {
  const LowRankArgs* args;
  std::atomic<bool> failed{false};
};

void low_rank_body(void* argument, RangeSource& ranges) {
  LowRankJob& job = *static_cast<LowRankJob*>(argument);
  const LowRankArgs& a = *job.args;
  const std::unique_ptr<float[]> dots = room_for_dots(a.factors.rank);
  if (!dots) {
    job.failed.store(true);
    return;
  }
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t p = begin; p < end; ++p) {
      float* out = a.out + p * a.columns;
      std::copy(a.x + p * a.columns, a.x + (p + 1) * a.columns, out);
      const LowRank factors = of_problem(a.factors, p, a.columns);
      kernels().low_rank_row(factors.left, factors.right, factors.rank, a.columns, dots.get(), out);
    }
  }
}

void row_dots_body(void* argument, RangeSource& ranges) {
  const RowDotsArgs& a = *static_cast<const RowDotsArgs*>(argument);
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t p = begin; p < end; ++p) {
      a.out[p] = kernels().dot(a.x + p * a.columns, a.y + p * a.columns, a.columns);
    }
  }
}

}  // namespace

Status random_uniforms(const RandomRows& random, float* out) { return random_rows(random, false, out); }

Status random_normals(const RandomRows& random, float* out) { return random_rows(random, true, out); }

Status sample_codes(const SampleArgs& args) {
  Status status = check(args.random);
  if (status == Status::ok) status = check(args.factors);
  if (status != Status::ok) return status;
  SampleJob job;
  job.args = &args;
  parallel_run(args.random.n_problems * args.random.rows, rows_at_a_time(args.random.columns), sample_body, &job);
  return job.failed ? no_memory(args.factors.rank) : Status::ok;
}

Status code_moments(const MomentsArgs& args) {
  if (args.n_problems < 0 || args.rows < 0 || args.columns < 1) {
    return fail(Status::invalid_argument, "negative problems or rows, or no columns");
  }
  if (args.second != nullptr && args.centre == nullptr) {
    return fail(Status::invalid_argument, "the second moment needs a centre");
  }
  MomentsArgs job = args;
  const std::int64_t blocks = (args.columns + kMomentsColumns - 1) / kMomentsColumns;
  parallel_run(args.n_problems * blocks, rows_at_a_time(std::min(kMomentsColumns, args.columns)), moments_body, &job);
  return Status::ok;
}

Status low_rank_product(const LowRankArgs& args) {
  const Status status = check(args.factors);
  if (status != Status::ok) return status;
  LowRankJob job;
  job.args = &args;
  parallel_run(args.n_problems, rows_at_a_time(args.columns), low_rank_body, &job);
  return job.failed ? no_memory(args.factors.rank) : Status::ok;
}

Status row_dots(const RowDotsArgs& args) {
  if (args.n_problems < 0 || args.columns < 1) {
    return fail(Status::invalid_argument, "a negative number of problems, or no columns");
  }
  RowDotsArgs job = args;
  parallel_run(args.n_problems, rows_at_a_time(args.columns), row_dots_body, &job);
  return Status::ok;
}

}  // namespace cpu
}  // namespace cortexloop
