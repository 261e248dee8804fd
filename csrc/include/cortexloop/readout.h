// Readouts of feature maps: many neurons at once, each a weighted sum of the features, and their gradients.
//
// Sums have an order that follows from the shapes alone, so that results have the same bits for any number of threads and any
// batch that an image is part of.
#pragma once

#include <cstdint>

#include "cortexloop/status.h"

namespace cortexloop {

// Neuron t weighs feature (c, s) by sum_r vectors[t, r, c] masks[t, r, s].
struct FactorizedWeights {
  const float* masks;    // [neurons, rank, positions]
  const float* vectors;  // [neurons, rank, channels]
  std::int64_t neurons, rank, channels, positions;
};

// responses[b, t] = sum_r sum_c vectors[t, r, c] sum_s masks[t, r, s] features[b, c, s].
struct FactorizedReadoutArgs {
  FactorizedWeights weights;
  const float* features;  // [batch, channels, positions]
  std::int64_t batch;
  float* responses;  // [batch, neurons]
};

// Gradients of sum(cotangent * responses).
struct FactorizedReadoutGradientArgs {
  FactorizedWeights weights;
  const float* features;  // [batch, channels, positions]
  std::int64_t batch;
  const float* cotangent;  // [batch, neurons]
  float* d_features;       // [batch, channels, positions]; null: not wanted
  float* d_masks;          // [neurons, rank, positions]; null: not wanted
  float* d_vectors;        // [neurons, rank, channels]; null: not wanted
};

// Neuron t looks at one point of the map, between pixels by bilinear interpolation; outside of it there are zeros.
struct PointReadoutShape {
  std::int64_t batch, channels, height, width, neurons;
  bool shared_positions;  // one set of positions for all images
  bool align_corners;     // -1 and 1 are the centres of the outermost pixels; else their outer edges
};

// responses[b, t] = sum_c vectors[t, c] features[b, c] at positions[b, t].
struct PointReadoutArgs {
  PointReadoutShape shape;
  const float* features;   // [batch, channels, height, width]
  const float* positions;  // [batch, neurons, 2], or [neurons, 2] if shared: x, y
  const float* vectors;    // [neurons, channels]
  float* responses;        // [batch, neurons]
};

struct PointReadoutGradientArgs {
  PointReadoutShape shape;
  const float* features;   // [batch, channels, height, width]
  const float* positions;  // [batch, neurons, 2], or [neurons, 2] if shared
  const float* vectors;    // [neurons, channels]
  const float* cotangent;  // [batch, neurons]
  float* d_features;       // [batch, channels, height, width]; null: not wanted
  float* d_positions;      // as positions; null: not wanted
  float* d_vectors;        // [neurons, channels]; null: not wanted
};

namespace cpu {

Status factorized_readout(const FactorizedReadoutArgs& args);
Status factorized_readout_gradient(const FactorizedReadoutGradientArgs& args);
Status point_readout(const PointReadoutArgs& args);
Status point_readout_gradient(const PointReadoutGradientArgs& args);

}  // namespace cpu
}  // namespace cortexloop
