// Host side of the running moments: validation, responses packed for the kernel, scheduling. Arithmetic: kernels/moments.inl.h.
#include "cortexloop/moments.h"

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

constexpr std::int64_t kMaxSize = std::int64_t{1} << 40;
constexpr std::int64_t kMaxImages = std::int64_t{1} << 24;
// A thread takes some neighbouring tiles at a time: while it works on one, the next is fetched.
constexpr std::int64_t kTilesAtATime = 8;
constexpr std::size_t kAlignment = 64;

Status check(const FeatureMomentsArgs& a) {
  if (a.images < 1 || a.columns < 1 || a.neurons < 1) {
    return fail(Status::invalid_argument, "images, columns and neurons should each be at least 1");
  }
  if (a.images > kMaxImages || a.columns > kMaxSize / a.images || a.columns > kMaxSize / a.neurons ||
      a.neurons > kMaxSize / (a.images + 2)) {
    return fail(Status::invalid_argument, "a batch may have 2^24 images, and 2^40 features, products or responses");
  }
  if (!(std::isfinite(a.before) && a.before >= 0.0 && std::isfinite(a.batch) && a.batch > 0.0)) {
    return fail(Status::invalid_argument,
                "weights should be finite, that before at least 0 and that of the batch above 0");
  }
  return Status::ok;
}

// Responses in groups of neurons, with the two rows that complete the merge.
void pack(const FeatureMomentsArgs& a, float* packed) {
  const double factor = a.before * (a.batch / (a.before + a.batch));
  for (std::int64_t first = 0; first < a.neurons; first += kResponseGroup) {
    const std::int64_t count = std::min<std::int64_t>(kResponseGroup, a.neurons - first);
    double sums[kResponseGroup] = {};
    for (std::int64_t i = 0; i < a.images; ++i, packed += kResponseGroup) {
      const float* row = a.centred + i * a.neurons + first;
      for (std::int64_t t = 0; t < kResponseGroup; ++t) packed[t] = t < count ? row[t] : 0.0f;
      for (std::int64_t t = 0; t < count; ++t) sums[t] += static_cast<double>(row[t]);
    }
    for (std::int64_t t = 0; t < kResponseGroup; ++t) {
      packed[t] = t < count ? static_cast<float>(factor * static_cast<double>(a.shift[first + t])) : 0.0f;
      packed[kResponseGroup + t] = static_cast<float>(-sums[t]);
    }
    packed += 2 * kResponseGroup;
  }
}

std::unique_ptr<float[]> room(std::int64_t floats) {
  return std::unique_ptr<float[]>(new (std::nothrow) float[static_cast<std::size_t>(floats)]);
}

struct Job {
  MomentsJob moments;
  const Kernels* kernels;  // chosen once: the instruction set may be changed meanwhile
  std::atomic<bool> failed{false};
};

void body(void* argument, RangeSource& ranges) {
  Job& job = *static_cast<Job*>(argument);
  const std::int64_t bytes = job.kernels->moments_scratch_bytes;
  const std::int64_t tile = job.kernels->moments_tile;
  std::unique_ptr<char[]> memory(new (std::nothrow) char[static_cast<std::size_t>(bytes) + kAlignment]);
  if (!memory) {
    job.failed.store(true);
    return;
  }
  void* scratch = memory.get();
  std::size_t space = static_cast<std::size_t>(bytes) + kAlignment;
  std::align(kAlignment, static_cast<std::size_t>(bytes), scratch, space);
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    job.kernels->feature_moments(job.moments, begin * tile, std::min(end * tile, job.moments.args.columns), scratch);
  }
}

}  // namespace

Status feature_moments(const FeatureMomentsArgs& args) {
  const Status status = check(args);
  if (status != Status::ok) return status;
  const std::int64_t groups = (args.neurons + kResponseGroup - 1) / kResponseGroup;
  const std::unique_ptr<float[]> responses = room(groups * (args.images + 2) * kResponseGroup);
  const std::unique_ptr<float[]> ones = room(args.weights == nullptr ? args.images : 1);
  if (!responses || !ones) return fail(Status::out_of_memory, "no memory for the responses of a batch");
  if (args.weights == nullptr) std::fill(ones.get(), ones.get() + args.images, 1.0f);
  pack(args, responses.get());
  Job job;
  job.moments = {args, args.weights == nullptr ? ones.get() : args.weights, responses.get()};
  job.kernels = &kernels();
  const std::int64_t tile = job.kernels->moments_tile;
  const std::int64_t tiles = (args.columns + tile - 1) / tile;
  const std::int64_t fair = std::max<std::int64_t>(1, tiles / (4 * num_threads()));
  parallel_run(tiles, std::min(kTilesAtATime, fair), body, &job);
  return job.failed ? fail(Status::out_of_memory, "no memory for a part of the features per thread") : Status::ok;
}

}  // namespace cpu
}  // namespace cortexloop
