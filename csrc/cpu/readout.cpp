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

// Ranges of channels that are summed apart: a number that follows from the weights' shapes, as bits may not depend on threads.
constexpr std::int64_t kChannelRanges = 16, kRangeChannels = 16;  // at most, each at least
constexpr std::int64_t kPartNumbers = std::int64_t{1} << 24;      // of all ranges together, in the gradient by masks
constexpr std::int64_t kImagesTogether = 1024;                    // in the forward pass
constexpr std::int64_t kBlocksTogether = 4;                       // in the gradients by factors
constexpr std::int64_t kMostColumns = 256;                        // features at a time in the gradient by features
constexpr std::int64_t kPanelNumbers = 65536;                     // and weights: 256 KB

struct Ranges {
  std::int64_t channels, count;
  explicit Ranges(std::int64_t n, std::int64_t most = kChannelRanges)
      : channels(n),
        count(std::min((n + kRangeChannels - 1) / kRangeChannels, most)) {}
  std::int64_t first(std::int64_t range) const { return channels * range / count; }
};

FeatureGroups groups_of(std::int64_t positions, std::int64_t features) {
  const std::int64_t most = features / kGroupChannels;
  const std::int64_t pieces = (positions + most - 1) / most;
  const std::int64_t each = (positions + pieces - 1) / pieces;
  return {features / each / kGroupChannels * kGroupChannels, each};
}

// All neurons in blocks, packed so that neighbouring neurons are neighbours in memory.
class PackedWeights {
 public:
  explicit PackedWeights(const FactorizedWeights& weights) : weights_(weights) {
    const std::int64_t last = weights.neurons % kBlockNeurons;
    blocks_ = (weights.neurons + kBlockNeurons - 1) / kBlockNeurons;
    last_width_ = static_cast<std::int32_t>(last == 0 ? kBlockNeurons
                                                      : (last + kBlockPadding - 1) / kBlockPadding * kBlockPadding);
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

  std::int32_t width(std::int64_t block) const { return block + 1 == blocks_ ? last_width_ : kBlockNeurons; }

  NeuronBlock block(std::int64_t index) const {
    const FactorizedWeights& w = weights_;
    return {masks(index), vectors(index), w.rank, w.channels, w.positions, width(index)};
  }

 private:
  float* masks(std::int64_t block) const { return memory_.get() + block * each_; }  // [rank, positions, width]
  float* vectors(std::int64_t block) const {                                        // [rank, channels, width]
    return masks(block) + weights_.rank * weights_.positions * width(block);
  }

  static void pack_body(void* argument, RangeSource& ranges) {
    PackedWeights& self = *static_cast<PackedWeights*>(argument);
    const FactorizedWeights& w = self.weights_;
    std::int64_t begin, end;
    while (ranges.take(begin, end)) {
      for (std::int64_t unit = begin; unit < end; ++unit) {
        const std::int64_t index = unit / w.rank, r = unit % w.rank, row = index * kBlockNeurons * w.rank + r;
        const std::int32_t count = self.count(index), width = self.width(index);
        kernels().readout.transpose(w.masks + row * w.positions, w.rank * w.positions, count, w.positions, width,
                                    self.masks(index) + r * w.positions * width);
        kernels().readout.transpose(w.vectors + row * w.channels, w.rank * w.channels, count, w.channels, width,
                                    self.vectors(index) + r * w.channels * width);
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
    return fail(Status::invalid_argument,
                "no channels, positions or factors, or a negative number of images or neurons");
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
  const FeatureGroups groups = groups_of(a.weights.positions, kPanelDepth);
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
      kernels().readout.images(job.packed->block(block), groups, a.features, a.batch, channels.first(range),
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
      const std::int32_t width = job.packed->width(block);
      const float* parts = job.parts + block * channels.count * a.batch * kBlockNeurons + b * width;
      std::fill(out, out + width, 0.0f);
      kernels().readout.add(parts, channels.count, a.batch * kBlockNeurons, width, out);
      std::copy(out, out + job.packed->count(block), a.responses + b * a.weights.neurons + block * kBlockNeurons);
    }
  }
}

struct GradientJob {
  const FactorizedReadoutGradientArgs* args;
  std::int64_t columns;  // features at a time, for the gradient by features; for rank 1, numbers in a row of masks
  const float* masks;    // rank 1: [neurons, columns]
  const PackedWeights* packed;
  Ranges ranges{1};        // of channels, for the gradients by factors
  const float* cotangent;  // [blocks, batch, kBlockNeurons]
  float* d_masks;          // [blocks, ranges, kBlockNeurons * rank * positions]
  float* d_vectors;        // [blocks, kBlockNeurons * rank * channels]
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
      const std::int64_t count = std::min(job.columns, features - first);
      kernels().readout.back_features(a, first, static_cast<std::int32_t>(count),
                                      static_cast<std::int32_t>(job.columns), panel.get(), tail.get());
    }
  }
}

// Rank 1: an image and a block of channels at a time.
void image_features_body(void* argument, RangeSource& ranges) {
  GradientJob& job = *static_cast<GradientJob*>(argument);
  const FactorizedReadoutGradientArgs& a = *job.args;
  const FactorizedWeights& w = a.weights;
  const std::int64_t blocks = (w.channels + kBlockNeurons - 1) / kBlockNeurons;
  const std::unique_ptr<float[]> scaled = scratch(kBlockNeurons * w.neurons);
  const std::unique_ptr<float[]> tail = scratch(kBlockNeurons * kBlockPadding);
  if (!scaled || !tail) {
    job.failed.store(true);
    return;
  }
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t b = unit / blocks, c = unit % blocks * kBlockNeurons;
      kernels().readout.back_image(w, job.masks, job.columns, a.cotangent + b * w.neurons, c,
                                   std::min<std::int64_t>(kBlockNeurons, w.channels - c), scaled.get(), tail.get(),
                                   a.d_features + (b * w.channels + c) * w.positions);
    }
  }
}

Status feature_gradient(GradientJob& job) {
  const FactorizedReadoutGradientArgs& a = *job.args;
  const FactorizedWeights& w = a.weights;
  if (w.rank == 1) {
    job.columns = (w.positions + kBlockPadding - 1) / kBlockPadding * kBlockPadding;
    const std::unique_ptr<float[]> masks = scratch(w.neurons * job.columns);
    if (!masks) return no_scratch(w.neurons * job.columns);
    for (std::int64_t t = 0; t < w.neurons; ++t) {
      const float* row = w.masks + t * w.positions;
      float* to = masks.get() + t * job.columns;
      std::fill(std::copy(row, row + w.positions, to), to + job.columns, 0.0f);
    }
    job.masks = masks.get();
    const std::int64_t blocks = (w.channels + kBlockNeurons - 1) / kBlockNeurons;
    parallel_run(a.batch * blocks, 1, image_features_body, &job);
    return job.failed ? no_scratch(kBlockNeurons * w.neurons) : Status::ok;
  }
  const std::int64_t features = w.channels * w.positions;
  const std::int64_t fitting = kPanelNumbers / std::max<std::int64_t>(1, w.neurons) / kBlockPadding * kBlockPadding;
  job.columns = std::min(kMostColumns, std::max<std::int64_t>(4 * kBlockPadding, fitting));
  parallel_run((features + job.columns - 1) / job.columns, 1, features_body, &job);
  return job.failed ? no_scratch(w.neurons * job.columns + a.batch * kBlockPadding) : Status::ok;
}

// A range of channels and up to kBlocksTogether blocks of neurons at a time: they share tiles of features.
void factors_body(void* argument, RangeSource& ranges) {
  GradientJob& job = *static_cast<GradientJob*>(argument);
  const FactorizedReadoutGradientArgs& a = *job.args;
  const FactorizedWeights& w = a.weights;
  const PackedWeights& packed = *job.packed;
  const Ranges& channel_ranges = job.ranges;
  const FeatureGroups groups = groups_of(w.positions, kColumns);
  const std::int64_t masks = kBlockNeurons * w.rank * w.positions, vectors = kBlockNeurons * w.rank * w.channels;
  const std::int64_t stride = w.channels * w.positions, each = kBlockNeurons * kColumns;
  const std::unique_ptr<float[]> tile = scratch(kTileImages * kColumns);
  const std::unique_ptr<float[]> panels = scratch(kBlocksTogether * each);
  if (!tile || !panels) {
    job.failed.store(true);
    return;
  }
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t range = unit % channel_ranges.count, first = unit / channel_ranges.count * kBlocksTogether;
      const std::int64_t last = std::min(first + kBlocksTogether, packed.blocks());
      for (std::int64_t c = channel_ranges.first(range); c < channel_ranges.first(range + 1); c += groups.channels) {
        const std::int64_t channels = std::min(groups.channels, channel_ranges.first(range + 1) - c);
        for (std::int64_t s = 0; s < w.positions; s += groups.positions) {
          const std::int64_t count = std::min(groups.positions, w.positions - s), columns = channels * count;
          if (a.batch == 0) std::fill(panels.get(), panels.get() + kBlocksTogether * each, 0.0f);
          for (std::int64_t image = 0; image < a.batch; image += kTileImages) {
            const std::int64_t images = std::min<std::int64_t>(kTileImages, a.batch - image);
            for (std::int64_t b = 0; b < images; ++b) {  // images are pages apart: bring their features together
              const float* from = a.features + (image + b) * stride + c * w.positions + s;
              float* to = tile.get() + b * kColumns;
              for (std::int64_t k = 0; k < channels; ++k)
                to = std::copy(from + k * w.positions, from + k * w.positions + count, to);
              std::fill(to, tile.get() + (b + 1) * kColumns, 0.0f);
            }
            for (std::int64_t block = first; block < last; ++block) {
              const std::int32_t width = packed.width(block);
              kernels().readout.outer(tile.get(), job.cotangent + block * a.batch * kBlockNeurons + image * width,
                                      width, images, columns, image > 0, panels.get() + (block - first) * each);
            }
          }
          for (std::int64_t block = first; block < last; ++block) {
            kernels().readout.contract(packed.block(block), panels.get() + (block - first) * each, c, channels, s,
                                       count, job.d_masks + (block * channel_ranges.count + range) * masks,
                                       job.d_vectors + block * vectors);
          }
        }
      }
    }
  }
}

// Each factor of a block of neurons back to where it came from; ranges of channels are added up for the masks.
void unpack_body(void* argument, RangeSource& ranges) {
  const GradientJob& job = *static_cast<const GradientJob*>(argument);
  const FactorizedReadoutGradientArgs& a = *job.args;
  const FactorizedWeights& w = a.weights;
  const std::int64_t count = job.ranges.count;
  const std::int64_t masks = kBlockNeurons * w.rank * w.positions, vectors = kBlockNeurons * w.rank * w.channels;
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t block = unit / w.rank, r = unit % w.rank, row = block * kBlockNeurons * w.rank + r;
      const std::int32_t width = job.packed->width(block), neurons = job.packed->count(block);
      if (a.d_masks != nullptr) {
        float* parts = job.d_masks + block * count * masks + r * w.positions * width;
        kernels().readout.add(parts + masks, count - 1, masks, w.positions * width, parts);
        kernels().readout.back_transpose(parts, width, neurons, w.positions, w.rank * w.positions,
                                         a.d_masks + row * w.positions);
      }
      if (a.d_vectors != nullptr) {
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
  const std::int64_t all_masks = packed.blocks() * kBlockNeurons * w.rank * w.positions;
  job.ranges = Ranges(w.channels, std::min(kChannelRanges, std::max<std::int64_t>(1, kPartNumbers / all_masks)));
  const std::int64_t masks = job.ranges.count * all_masks;
  const std::int64_t vectors = packed.blocks() * kBlockNeurons * w.rank * w.channels;
  const std::unique_ptr<float[]> cotangent = scratch(packed.blocks() * a.batch * kBlockNeurons);
  const std::unique_ptr<float[]> d_masks = scratch(masks), d_vectors = scratch(vectors);
  if (!cotangent || !d_masks || !d_vectors || !packed.pack()) return no_scratch(masks + vectors + packed.numbers());
  for (std::int64_t block = 0; block < packed.blocks(); ++block) {
    const std::int32_t width = packed.width(block), count = packed.count(block);
    for (std::int64_t b = 0; b < a.batch; ++b) {
      const float* from = a.cotangent + b * w.neurons + block * kBlockNeurons;
      float* to = cotangent.get() + block * a.batch * kBlockNeurons + b * width;
      std::fill(std::copy(from, from + count, to), to + width, 0.0f);
    }
  }
  job.packed = &packed;
  job.cotangent = cotangent.get();
  job.d_masks = d_masks.get();
  job.d_vectors = d_vectors.get();
  std::fill(d_masks.get(), d_masks.get() + masks, 0.0f);
  std::fill(d_vectors.get(), d_vectors.get() + vectors, 0.0f);
  const std::int64_t together = (packed.blocks() + kBlocksTogether - 1) / kBlocksTogether;
  parallel_run(together * job.ranges.count, 1, factors_body, &job);
  if (job.failed) return no_scratch((kTileImages + kBlocksTogether * kBlockNeurons) * kColumns);
  parallel_run(packed.blocks() * w.rank, 1, unpack_body, &job);
  return Status::ok;
}

}  // namespace

Status factorized_readout(const FactorizedReadoutArgs& args) {
  const FactorizedWeights& w = args.weights;
  const Status status = check(w, args.batch);
  if (status != Status::ok) return status;
  if (args.batch == 0 || w.neurons == 0) return Status::ok;
  PackedWeights packed(w);
  if (!packed.pack()) return no_scratch(packed.numbers());
  ForwardJob job;
  job.args = &args;
  job.packed = &packed;
  job.parts = nullptr;
  if (w.rank == 1) {
    parallel_run(packed.blocks() * args.batch, 1, image_body, &job);
    return job.failed ? no_scratch(kBlockNeurons * kBlockNeurons) : Status::ok;
  }
  FactorizedReadoutArgs some = args;
  job.args = &some;
  const std::int64_t ranges = packed.blocks() * Ranges(w.channels).count;
  const std::int64_t numbers = ranges * std::min(args.batch, kImagesTogether) * kBlockNeurons;
  const std::unique_ptr<float[]> parts = scratch(numbers);
  if (!parts) return no_scratch(numbers);
  job.parts = parts.get();
  for (std::int64_t image = 0; image < args.batch; image += kImagesTogether) {
    some.batch = std::min(kImagesTogether, args.batch - image);
    some.features = args.features + image * w.channels * w.positions;
    some.responses = args.responses + image * w.neurons;
    parallel_run(ranges, 1, images_body, &job);
    if (job.failed) return no_scratch((kPanelDepth + some.batch) * kBlockNeurons);
    parallel_run(packed.blocks() * some.batch, 16, sum_body, &job);
  }
  return Status::ok;
}

Status factorized_readout_gradient(const FactorizedReadoutGradientArgs& args) {
  const FactorizedWeights& w = args.weights;
  const Status status = check(w, args.batch);
  if (status != Status::ok) return status;
  GradientJob job;
  job.args = &args;
  if (args.d_features != nullptr) {
    const Status features = feature_gradient(job);
    if (features != Status::ok) return features;
  }
  if (w.neurons == 0 || (args.d_masks == nullptr && args.d_vectors == nullptr)) return Status::ok;
  return factor_gradients(job);
}

}  // namespace cpu
}  // namespace cortexloop
