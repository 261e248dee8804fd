// What readout.cpp and point_readout.cpp share with the kernels compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cortexloop/readout.h"

namespace cortexloop {
namespace cpu {

constexpr std::int32_t kBlockNeurons = 64;   // neurons side by side in a packed block: 4 vectors of the widest set
constexpr std::int32_t kBlockPadding = 16;   // a block's width is a multiple of this
constexpr std::int32_t kProductDepth = 512;  // positions summed in registers: 512 x 64 masks are 128 KB
constexpr std::int32_t kPanelDepth = 128;    // the same of weights made on the way: 32 KB
constexpr std::int32_t kColumns = 120;       // features at a time in the gradients by factors
constexpr std::int32_t kGroupChannels = 4;   // channels that share a visit to the masks of some positions
constexpr std::int32_t kTileImages = 128;    // images at a time there

// Up to kBlockNeurons neurons, neighbours in memory; those from the last real one to `width` are zeros.
struct NeuronBlock {
  const float* masks;    // [rank, positions, width]
  const float* vectors;  // [rank, channels, width]
  std::int64_t rank, channels, positions;
  std::int32_t width;
};

// Features at a time: some positions of some channels, so that the masks of these positions are fetched once for all of them.
struct FeatureGroups {
  std::int64_t channels, positions;
};

// Where a neuron looks: four taps (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1) from `base` on, their weights, and the weights'
// derivatives by x and y in pixels. Taps outside of the map weigh nothing, and base is moved so that all can be read.
struct PointTaps {
  std::int32_t* base;  // [neurons]: offset in a map
  float* weights;      // [neurons, 4]
  float* by_x;         // [neurons, 4]; null: not wanted
  float* by_y;         // [neurons, 4]; null: not wanted
};

// Offsets from the first tap: 1 and the width, or 0 where the map has one column or one row.
struct TapSteps {
  std::int32_t column, row;
};

struct ReadoutKernels {
  // panel[i, t] = rows[t, i], t < count; zeros up to `width`.
  void (*transpose)(const float* rows, std::int64_t stride, std::int32_t count, std::int64_t length, std::int32_t width,
                    float* panel);

  // One image, one block. `products`: room for kBlockNeurons * kBlockNeurons; out [width].
  void (*image)(const NeuronBlock& block, const float* image, float* products, float* out);

  // All images, channels [first, last) of one block, groups of at most kPanelDepth features. `panel`: room for kPanelDepth * width, `products` for batch * width;
  // out [batch, width].
  void (*images)(const NeuronBlock& block, const FeatureGroups& groups, const float* features, std::int64_t batch,
                 std::int64_t first, std::int64_t last, float* panel, float* products, float* out);

  // out += parts[0] + parts[1] + ..., `stride` apart, one after the other.
  void (*add)(const float* parts, std::int64_t n_parts, std::int64_t stride, std::int64_t count, float* out);

  // Features [first, first + count) of all images, numbered through channels and positions; count <= columns.
  // `panel`: room for neurons * columns, `tail` for batch * kBlockPadding.
  void (*back_features)(const FactorizedReadoutGradientArgs& args, std::int64_t first, std::int32_t count,
                        std::int32_t columns, float* panel, float* tail);

  // Rank 1, one image, `rows` channels from `channel` on: out [rows, positions]. masks [neurons, padded], zeros at the end of each
  // row. `scaled`: room for rows * neurons, `tail` for rows * kBlockPadding.
  void (*back_image)(const FactorizedWeights& weights, const float* masks, std::int64_t padded, const float* cotangent,
                     std::int64_t channel, std::int64_t rows, float* scaled, float* tail, float* out);

  // panel[column, t] = sum over images of tile[image, column] cotangent[image, t], added to what is there if `add`.
  // tile [images, kColumns], zeros from `columns` on; cotangent [images, width]; panel [kColumns, width].
  void (*outer)(const float* tile, const float* cotangent, std::int32_t width, std::int64_t images,
                std::int64_t columns, bool add, float* panel);

  // Adds to d_masks [rank, positions, width] and d_vectors [rank, channels, width] what panel [channels, count, width] says of
  // `channels` channels from `channel` on and `count` positions from `position` on.
  void (*contract)(const NeuronBlock& block, const float* panel, std::int64_t channel, std::int64_t channels,
                   std::int64_t position, std::int64_t count, float* d_masks, float* d_vectors);

  // rows[t, i] = panel[i, t], t < count.
  void (*back_transpose)(const float* panel, std::int32_t width, std::int32_t count, std::int64_t length,
                         std::int64_t stride, float* rows);

  TapSteps (*point_taps)(const PointReadoutShape& shape, const float* positions, const PointTaps& taps);

  // sums[t] = sum over channels of vectors[t] times the four taps, [count, 4].
  void (*point_sums)(const PointReadoutShape& shape, const float* image, TapSteps steps, const std::int32_t* base,
                     const float* vectors, std::int64_t count, float* sums);

  // Adds `weights` [neurons, 4] times the taps of `count` channels, from `map` on, to sums [count, neurons, 4].
  void (*point_features)(const PointReadoutShape& shape, const float* map, std::int32_t count, TapSteps steps,
                         const std::int32_t* base, const float* weights, float* sums);

  // Sets `count` channels, from `map` on, to the sum of vectors[t, c] weights[t] at the taps of t; vectors at their first channel.
  void (*point_scatter)(const PointReadoutShape& shape, std::int32_t count, TapSteps steps, const std::int32_t* base,
                        const float* vectors, const float* weights, float* map);
};

}  // namespace cpu
}  // namespace cortexloop
