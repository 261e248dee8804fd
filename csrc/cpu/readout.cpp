// Host side of factorized readouts: validation and scheduling. The arithmetic is in kernels/readout.inl.h.
#include "cortexloop/readout.h"

#include <algorithm>
#include <atomic>

#include "cortexloop/parallel.h"
#include "dispatch.h"
#include "scratch.h"

namespace cortexloop {
namespace cpu {
namespace {

// Ranges of channels that are summed apart. A fixed number: the bits may not depend on the number of threads.
constexpr std::int64_t kChannelRanges = 16;
constexpr std::int64_t kMostColumns = 256;     // features at a time in the gradient by features
constexpr std::int64_t kPanelNumbers = 65536;  // and weights: 256 KB

struct Ranges {
  std::int64_t channels, count;
  explicit Ranges(std::int64_t n) : channels(n), count(std::min(n, kChannelRanges)) {}
  std::int64_t first(std::int64_t range) const { return channels * range / count; }
};

// All neurons in blocks, packed so that neighbouring neurons are neighbours in memory.
class PackedWeights {
 public:
  explicit PackedWeights(const FactorizedWeights& weights) : weights_(weights) {
    const std::int64_t last = weights.neurons % kBlockNeurons;
    blocks_ = (weights.neurons + kBlockNeurons - 1) / kBlockNeurons;
    last_width_ = static_cast<std::int32_t>(
        last == 0 ? kBlockNeurons : (last + kBlockPadding - 1) / kBlockPadding * kBlockPadding);
    each_ = kBlockNeurons * weights.rank * (weights.positions + weights.channels);
  }

  std::int64_t blocks() const { return blocks_; }
  std::int64_t numbers() const { return blocks_ * each_; }

  bool pack() {
    memory_ = scratch(numbers());
    if (!memory_) return false;
    parallel_run(blocks_ * weights_.rank, 1, pack_body, this);
    return true;
  }

  std::int32_t count(std::int64_t block) const {
    return static_cast<std::int32_t>(std::min<std::int64_t>(kBlockNeurons, weights_.neurons - block * kBlockNeurons));
  }

  NeuronBlock block(std::int64_t index) const {
    const std::int32_t width = index + 1 == blocks_ ? last_width_ : kBlockNeurons;
    const float* masks = memory_.get() + index * each_;
    return {masks,           masks + weights_.rank * weights_.positions * width,
            weights_.rank,   weights_.channels,
            weights_.positions, width};
  }

 private:
  static void pack_body(void* argument, RangeSource& ranges) {
    PackedWeights& self = *static_cast<PackedWeights*>(argument);
    const FactorizedWeights& w = self.weights_;
    std::int64_t begin, end;
    while (ranges.take(begin, end)) {
      for (std::int64_t unit = begin; unit < end; ++unit) {
        const std::int64_t index = unit / w.rank, r = unit % w.rank, row = index * kBlockNeurons * w.rank + r;
        const NeuronBlock to = self.block(index);
        float* masks = self.memory_.get() + (to.masks - self.memory_.get()) + r * w.positions * to.width;
        float* vectors = self.memory_.get() + (to.vectors - self.memory_.get()) + r * w.channels * to.width;
        kernels().readout.transpose(w.masks + row * w.positions, w.rank * w.positions, self.count(index), w.positions,
                                    to.width, masks);
        kernels().readout.transpose(w.vectors + row * w.channels, w.rank * w.channels, self.count(index), w.channels,
                                    to.width, vectors);
      }
    }
  }

  FactorizedWeights weights_;
  std::int64_t blocks_ = 0, each_ = 0;
  std::int32_t last_width_ = 0;
  std::unique_ptr<float[]> memory_;
};

Status check(const FactorizedWeights& w, std::int64_t batch) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  if (batch < 0 || w.neurons < 0 || w.rank < 1 || w.channels < 1 || w.positions < 1) {
    return fail(Status::invalid_argument, "no channels, positions or factors, or a negative number of images or neurons");
  }
  if (batch >= kMost || w.neurons >= kMost || w.channels >= kMost / w.positions) {
    return fail(Status::invalid_argument, "images, neurons and features should each be below 2^31");
  }
  return Status::ok;
}

struct ForwardJob {
  const FactorizedReadoutArgs* args;
  const PackedWeights* packed;
  float* parts;  // [blocks, ranges, batch, kBlockNeurons]; null for rank 1
  std::atomic<bool> failed{false};
};

// Rank 1: an image and a block of neurons at a time.
void image_body(void* argument, RangeSource& ranges) {
  ForwardJob& job = *static_cast<ForwardJob*>(argument);
  const FactorizedReadoutArgs& a = *job.args;
  const FactorizedWeights& w = a.weights;
  const std::unique_ptr<float[]> products = scratch(kBlockNeurons * kBlockNeurons);
  if (!products) {
    job.failed.store(true);
    return;
  }
  float out[kBlockNeurons];
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t block = unit / a.batch, b = unit % a.batch;
      kernels().readout.image(job.packed->block(block), a.features + b * w.channels * w.positions, products.get(), out);
      std::copy(out, out + job.packed->count(block), a.responses + b * w.neurons + block * kBlockNeurons);
    }
  }
}

// Higher ranks: a range of channels and a block of neurons at a time, all images.
void images_body(void* argument, RangeSource& ranges) {
  ForwardJob& job = *static_cast<ForwardJob*>(argument);
  const FactorizedReadoutArgs& a = *job.args;
  const Ranges channels(a.weights.channels);
  const std::unique_ptr<float[]> panel = scratch(kPanelDepth * kBlockNeurons);
  const std::unique_ptr<float[]> products = scratch(a.batch * kBlockNeurons);
  if (!panel || !products) {
    job.failed.store(true);
    return;
  }
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t block = unit / channels.count, range = unit % channels.count;
      kernels().readout.images(job.packed->block(block), a.features, a.batch, channels.first(range),
                               channels.first(range + 1), panel.get(), products.get(),
                               job.parts + unit * a.batch * kBlockNeurons);
    }
  }
}

void sum_body(void* argument, RangeSource& ranges) {
  const ForwardJob& job = *static_cast<const ForwardJob*>(argument);
  const FactorizedReadoutArgs& a = *job.args;
  const Ranges channels(a.weights.channels);
  float out[kBlockNeurons];
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t block = unit / a.batch, b = unit % a.batch;
      const std::int32_t width = job.packed->block(block).width;
      const float* parts = job.parts + block * channels.count * a.batch * kBlockNeurons + b * width;
      std::fill(out, out + width, 0.0f);
      kernels().readout.add(parts, channels.count, a.batch * kBlockNeurons, width, out);
      std::copy(out, out + job.packed->count(block), a.responses + b * a.weights.neurons + block * kBlockNeurons);
    }
  }
}

struct GradientJob {
  const FactorizedReadoutGradientArgs* args;
  std::int32_t columns;  // features at a time, for the gradient by features
  const PackedWeights* packed;
  const float* cotangent;  // [blocks, batch, kBlockNeurons]
  float* d_masks;          // [blocks, ranges, kBlockNeurons * rank * positions]; null: not wanted
  float* d_vectors;        // [blocks, kBlockNeurons * rank * channels]; null: not wanted
  std::atomic<bool> failed{false};
};

void features_body(void* argument, RangeSource& ranges) {
  GradientJob& job = *static_cast<GradientJob*>(argument);
  const FactorizedReadoutGradientArgs& a = *job.args;
  const std::int64_t features = a.weights.channels * a.weights.positions;
  const std::unique_ptr<float[]> panel = scratch(a.weights.neurons * job.columns);
  const std::unique_ptr<float[]> tail = scratch(a.batch * kBlockPadding);
  if (!panel || !tail) {
    job.failed.store(true);
    return;
  }
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t first = unit * job.columns;
      const auto count = static_cast<std::int32_t>(std::min<std::int64_t>(job.columns, features - first));
      kernels().readout.back_features(a, first, count, job.columns, panel.get(), tail.get());
    }
  }
}

void factors_body(void* argument, RangeSource& ranges) {
  GradientJob& job = *static_cast<GradientJob*>(argument);
  const FactorizedReadoutGradientArgs& a = *job.args;
  const FactorizedWeights& w = a.weights;
  const Ranges channels(w.channels);
  const std::int64_t masks = kBlockNeurons * w.rank * w.positions, vectors = kBlockNeurons * w.rank * w.channels;
  const std::unique_ptr<float[]> tile = scratch(kTileImages * kColumns);
  const std::unique_ptr<float[]> panel = scratch(kBlockNeurons * kColumns);
  if (!tile || !panel) {
    job.failed.store(true);
    return;
  }
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t range = unit % channels.count, block = unit / channels.count;
      kernels().readout.back_factors(job.packed->block(block), job.cotangent + block * a.batch * kBlockNeurons,
                                     a.features, a.batch, channels.first(range), channels.first(range + 1), tile.get(),
                                     panel.get(), job.d_masks == nullptr ? nullptr : job.d_masks + unit * masks,
                                     job.d_vectors == nullptr ? nullptr : job.d_vectors + block * vectors);
    }
  }
}

// Each factor of a block of neurons back to where it came from; ranges of channels are added up for the masks.
void unpack_body(void* argument, RangeSource& ranges) {
  const GradientJob& job = *static_cast<const GradientJob*>(argument);
  const FactorizedReadoutGradientArgs& a = *job.args;
  const FactorizedWeights& w = a.weights;
  const std::int64_t count = Ranges(w.channels).count;
  const std::int64_t masks = kBlockNeurons * w.rank * w.positions, vectors = kBlockNeurons * w.rank * w.channels;
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t block = unit / w.rank, r = unit % w.rank, row = block * kBlockNeurons * w.rank + r;
      const std::int32_t width = job.packed->block(block).width, neurons = job.packed->count(block);
      if (job.d_masks != nullptr) {
        float* parts = job.d_masks + block * count * masks + r * w.positions * width;
        kernels().readout.add(parts + masks, count - 1, masks, w.positions * width, parts);
        kernels().readout.back_transpose(parts, width, neurons, w.positions, w.rank * w.positions,
                                         a.d_masks + row * w.positions);
      }
      if (job.d_vectors != nullptr) {
        kernels().readout.back_transpose(job.d_vectors + block * vectors + r * w.channels * width, width, neurons,
                                         w.channels, w.rank * w.channels, a.d_vectors + row * w.channels);
      }
    }
  }
}

Status factor_gradients(GradientJob& job) {
  const FactorizedReadoutGradientArgs& a = *job.args;
  const FactorizedWeights& w = a.weights;
  PackedWeights packed(w);
  const std::int64_t ranges = packed.blocks() * Ranges(w.channels).count;
  const std::int64_t masks = a.d_masks == nullptr ? 0 : ranges * kBlockNeurons * w.rank * w.positions;
  const std::int64_t vectors = a.d_vectors == nullptr ? 0 : packed.blocks() * kBlockNeurons * w.rank * w.channels;
  const std::unique_ptr<float[]> cotangent = scratch(packed.blocks() * a.batch * kBlockNeurons);
  const std::unique_ptr<float[]> d_masks = scratch(masks), d_vectors = scratch(vectors);
  if (!cotangent || !d_masks || !d_vectors || !packed.pack()) return no_scratch(masks + vectors + packed.numbers());
  for (std::int64_t block = 0; block < packed.blocks(); ++block) {
    const std::int32_t width = packed.block(block).width, count = packed.count(block);
    for (std::int64_t b = 0; b < a.batch; ++b) {
      const float* from = a.cotangent + b * w.neurons + block * kBlockNeurons;
      float* to = cotangent.get() + block * a.batch * kBlockNeurons + b * width;
      std::fill(std::copy(from, from + count, to), to + width, 0.0f);
    }
  }
  job.packed = &packed;
  job.cotangent = cotangent.get();
  job.d_masks = a.d_masks == nullptr ? nullptr : d_masks.get();
  job.d_vectors = a.d_vectors == nullptr ? nullptr : d_vectors.get();
  parallel_run(ranges, 1, factors_body, &job);
  if (job.failed) return no_scratch((kTileImages + kBlockNeurons) * kColumns);
  parallel_run(packed.blocks() * w.rank, 1, unpack_body, &job);
  return Status::ok;
}

}  // namespace

Status factorized_readout(const FactorizedReadoutArgs& args) {
  const Status status = check(args.weights, args.batch);
  if (status != Status::ok) return status;
  if (args.batch == 0 || args.weights.neurons == 0) return Status::ok;
  PackedWeights packed(args.weights);
  if (!packed.pack()) return no_scratch(packed.numbers());
  ForwardJob job;
  job.args = &args;
  job.packed = &packed;
  job.parts = nullptr;
  if (args.weights.rank == 1) {
    parallel_run(packed.blocks() * args.batch, 1, image_body, &job);
    return job.failed ? no_scratch(kBlockNeurons * kBlockNeurons) : Status::ok;
  }
  const std::int64_t ranges = packed.blocks() * Ranges(args.weights.channels).count;
  const std::int64_t numbers = ranges * args.batch * kBlockNeurons;
  const std::unique_ptr<float[]> parts = scratch(numbers);
  if (!parts) return no_scratch(numbers);
  job.parts = parts.get();
  parallel_run(ranges, 1, images_body, &job);
  if (job.failed) return no_scratch((kPanelDepth + args.batch) * kBlockNeurons);
  parallel_run(packed.blocks() * args.batch, 16, sum_body, &job);
  return Status::ok;
}

Status factorized_readout_gradient(const FactorizedReadoutGradientArgs& args) {
  const FactorizedWeights& w = args.weights;
  const Status status = check(w, args.batch);
  if (status != Status::ok) return status;
  GradientJob job;
  job.args = &args;
  job.columns = static_cast<std::int32_t>(std::min<std::int64_t>(
      kMostColumns, std::max<std::int64_t>(4 * kBlockPadding, kPanelNumbers / std::max<std::int64_t>(1, w.neurons) /
                                                              kBlockPadding * kBlockPadding)));
  if (args.d_features != nullptr && args.batch > 0) {
    const std::int64_t features = w.channels * w.positions;
    parallel_run((features + job.columns - 1) / job.columns, 1, features_body, &job);
    if (job.failed) return no_scratch(w.neurons * job.columns + args.batch * kBlockPadding);
  }
  if (w.neurons == 0 || (args.d_masks == nullptr && args.d_vectors == nullptr)) return Status::ok;
  return factor_gradients(job);
}

}  // namespace cpu
}  // namespace cortexloop
