// Host side of point readouts: validation and scheduling. The arithmetic is in kernels/point_readout.inl.h.
#include <algorithm>
#include <atomic>

#include "cortexloop/parallel.h"
#include "cortexloop/readout.h"
#include "dispatch.h"
#include "scratch.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr std::int64_t kNeuronsAtATime = 512;  // their sums are 8 KB
constexpr std::int64_t kChannelsAtATime = 4;   // in the gradients: the maps of one image stay in the second-level cache

Status check(const PointReadoutShape& shape) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  if (shape.batch < 0 || shape.neurons < 0 || shape.channels < 1 || shape.height < 1 || shape.width < 1) {
    return fail(Status::invalid_argument, "no channels or pixels, or a negative number of images or neurons");
  }
  if (shape.neurons >= kMost || shape.width >= kMost || shape.height >= kMost / shape.width) {
    return fail(Status::invalid_argument, "neurons and pixels should each be below 2^30");
  }
  return Status::ok;
}

// The taps of all images, or one set for all of them.
class Taps {
 public:
  Taps(const PointReadoutShape& shape, const float* positions, bool slopes)
      : shape_(shape),
        positions_(positions),
        sets_(shape.shared_positions ? 1 : shape.batch),
        slopes_(slopes) {}

  std::int64_t numbers() const { return sets_ * shape_.neurons * (slopes_ ? 13 : 5); }

  bool find() {
    const std::int64_t each = sets_ * shape_.neurons;
    base_ = scratch<std::int32_t>(each);
    weights_ = scratch(4 * each * (slopes_ ? 3 : 1));
    if (!base_ || !weights_) return false;
    parallel_run(sets_, 1, find_body, this);
    return true;
  }

  PointTaps of_image(std::int64_t image) const {
    const std::int64_t at = (shape_.shared_positions ? 0 : image) * shape_.neurons;
    const std::int64_t all = 4 * sets_ * shape_.neurons;
    float* weights = weights_.get() + 4 * at;
    return {base_.get() + at, weights, slopes_ ? weights + all : nullptr, slopes_ ? weights + 2 * all : nullptr};
  }

  TapSteps steps() const {
    return {shape_.width > 1 ? 1 : 0, shape_.height > 1 ? static_cast<std::int32_t>(shape_.width) : 0};
  }

 private:
  static void find_body(void* argument, RangeSource& ranges) {
    const Taps& self = *static_cast<const Taps*>(argument);
    std::int64_t begin, end;
    while (ranges.take(begin, end)) {
      for (std::int64_t set = begin; set < end; ++set) {
        kernels().readout.point_taps(self.shape_, self.positions_ + 2 * set * self.shape_.neurons, self.of_image(set));
      }
    }
  }

  PointReadoutShape shape_;
  const float* positions_;
  std::int64_t sets_;
  bool slopes_;
  std::unique_ptr<std::int32_t[]> base_;
  std::unique_ptr<float[]> weights_;
};

float weighted(const float* weights, const float* sums) {
  return (weights[0] * sums[0] + weights[1] * sums[1]) + (weights[2] * sums[2] + weights[3] * sums[3]);
}

std::int64_t blocks_of(std::int64_t count, std::int64_t each) { return (count + each - 1) / each; }

// Sums over channels of one image and block of neurons, and what becomes of them.
struct SumsJob {
  PointReadoutShape shape;
  const float* features;
  const float* vectors;
  const Taps* taps;
  float* responses;        // [batch, neurons]; null: gradients are wanted
  const float* cotangent;  // [batch, neurons]
  float* d_positions;      // [batch, neurons, 2]
};

void sums_body(void* argument, RangeSource& ranges) {
  const SumsJob& job = *static_cast<const SumsJob*>(argument);
  const PointReadoutShape& s = job.shape;
  const std::int64_t blocks = blocks_of(s.neurons, kNeuronsAtATime), map = s.height * s.width;
  const float half_x = 0.5f * static_cast<float>(s.align_corners ? s.width - 1 : s.width);
  const float half_y = 0.5f * static_cast<float>(s.align_corners ? s.height - 1 : s.height);
  float sums[4 * kNeuronsAtATime];
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t b = unit / blocks, first = unit % blocks * kNeuronsAtATime;
      const std::int64_t count = std::min(kNeuronsAtATime, s.neurons - first);
      const PointTaps taps = job.taps->of_image(b);
      kernels().readout.point_sums(s, job.features + b * s.channels * map, job.taps->steps(), taps.base + first,
                                   job.vectors + first * s.channels, count, sums);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t t = first + i, at = b * s.neurons + t;
        if (job.responses != nullptr) {
          job.responses[at] = weighted(taps.weights + 4 * t, sums + 4 * i);
        } else {
          job.d_positions[2 * at] = job.cotangent[at] * half_x * weighted(taps.by_x + 4 * t, sums + 4 * i);
          job.d_positions[2 * at + 1] = job.cotangent[at] * half_y * weighted(taps.by_y + 4 * t, sums + 4 * i);
        }
      }
    }
  }
}

void run_sums(SumsJob& job) {
  parallel_run(job.shape.batch * blocks_of(job.shape.neurons, kNeuronsAtATime), 1, sums_body, &job);
}

Status position_gradient(const PointReadoutGradientArgs& a, const Taps& taps) {
  const std::int64_t each = 2 * a.shape.neurons;
  const bool shared = a.shape.shared_positions;
  const std::unique_ptr<float[]> parts = scratch(shared ? a.shape.batch * each : 0);
  if (!parts) return no_scratch(a.shape.batch * each);
  SumsJob job = {a.shape, a.features, a.vectors, &taps, nullptr, a.cotangent, shared ? parts.get() : a.d_positions};
  run_sums(job);
  if (!shared) return Status::ok;
  std::fill(a.d_positions, a.d_positions + each, 0.0f);
  kernels().readout.add(parts.get(), a.shape.batch, each, each, a.d_positions);
  return Status::ok;
}

struct WeightedJob {
  const PointReadoutGradientArgs* args;
  const Taps* taps;
  const float* weights;  // [batch, neurons, 4]: cotangent times weights
  std::atomic<bool> failed{false};
};

void features_body(void* argument, RangeSource& ranges) {
  const WeightedJob& job = *static_cast<const WeightedJob*>(argument);
  const PointReadoutGradientArgs& a = *job.args;
  const PointReadoutShape& s = a.shape;
  const std::int64_t blocks = blocks_of(s.channels, kChannelsAtATime);
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t b = unit / blocks, c = unit % blocks * kChannelsAtATime;
      kernels().readout.point_scatter(s, static_cast<std::int32_t>(std::min(kChannelsAtATime, s.channels - c)),
                                      job.taps->steps(), job.taps->of_image(b).base, a.vectors + c,
                                      job.weights + 4 * b * s.neurons,
                                      a.d_features + (b * s.channels + c) * s.height * s.width);
    }
  }
}

void vectors_body(void* argument, RangeSource& ranges) {
  WeightedJob& job = *static_cast<WeightedJob*>(argument);
  const PointReadoutGradientArgs& a = *job.args;
  const PointReadoutShape& s = a.shape;
  const std::int64_t each = 4 * s.neurons;
  const std::unique_ptr<float[]> sums = scratch(kChannelsAtATime * each);
  if (!sums) {
    job.failed.store(true);
    return;
  }
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t c = unit * kChannelsAtATime;
      const std::int64_t count = std::min(kChannelsAtATime, s.channels - c);
      std::fill(sums.get(), sums.get() + count * each, 0.0f);
      for (std::int64_t b = 0; b < s.batch; ++b) {
        kernels().readout.point_features(s, a.features + (b * s.channels + c) * s.height * s.width,
                                         static_cast<std::int32_t>(count), job.taps->steps(),
                                         job.taps->of_image(b).base, job.weights + b * each, sums.get());
      }
      for (std::int64_t t = 0; t < s.neurons; ++t) {
        for (std::int64_t i = 0; i < count; ++i) {
          const float* sum = sums.get() + i * each + 4 * t;
          a.d_vectors[t * s.channels + c + i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
      }
    }
  }
}

Status weighted_gradients(const PointReadoutGradientArgs& a, const Taps& taps) {
  const PointReadoutShape& s = a.shape;
  const std::int64_t numbers = 4 * s.batch * s.neurons;
  const std::unique_ptr<float[]> weights = scratch(numbers);
  if (!weights) return no_scratch(numbers);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const float* of_image = taps.of_image(b).weights;
    for (std::int64_t t = 0; t < s.neurons; ++t) {
      for (std::int64_t k = 0; k < 4; ++k) {
        weights[4 * (b * s.neurons + t) + k] = a.cotangent[b * s.neurons + t] * of_image[4 * t + k];
      }
    }
  }
  WeightedJob job;
  job.args = &a;
  job.taps = &taps;
  job.weights = weights.get();
  const std::int64_t blocks = blocks_of(s.channels, kChannelsAtATime);
  if (a.d_features != nullptr) parallel_run(s.batch * blocks, 1, features_body, &job);
  if (a.d_vectors != nullptr) parallel_run(blocks, 1, vectors_body, &job);
  return job.failed ? no_scratch(4 * kChannelsAtATime * s.neurons) : Status::ok;
}

}  // namespace

Status point_readout(const PointReadoutArgs& args) {
  const Status status = check(args.shape);
  if (status != Status::ok) return status;
  Taps taps(args.shape, args.positions, false);
  if (!taps.find()) return no_scratch(taps.numbers());
  SumsJob job = {args.shape, args.features, args.vectors, &taps, args.responses, nullptr, nullptr};
  run_sums(job);
  return Status::ok;
}

Status point_readout_gradient(const PointReadoutGradientArgs& args) {
  Status status = check(args.shape);
  if (status != Status::ok) return status;
  Taps taps(args.shape, args.positions, args.d_positions != nullptr);
  if (!taps.find()) return no_scratch(taps.numbers());
  if (args.d_positions != nullptr) status = position_gradient(args, taps);
  if (status == Status::ok && (args.d_features != nullptr || args.d_vectors != nullptr)) {
    status = weighted_gradients(args, taps);
  }
  return status;
}

}  // namespace cpu
}  // namespace cortexloop
