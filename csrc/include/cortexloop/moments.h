// Running moments of features and their products with responses: one batch joins them (Chan, Golub & LeVeque 1983).
//
// With xb the weighted mean of the batch, d = xb - mean, f = before * batch / (before + batch):
//
//   cross += sum_i centred_i (x_i - xb) + f * shift * d
//   m2    += sum_i w_i (x_i - xb)^2 + f * d^2
//   mean  += d * batch / (before + batch)
//
// A column is computed by itself, images in one order, so its bits depend on neither threads nor other columns.
#pragma once

#include <cstdint>

#include "cortexloop/status.h"

namespace cortexloop {

enum class FeatureType : std::int32_t { f32 = 0, f16 = 1, bf16 = 2 };

struct FeatureMomentsArgs {
  const void* features;  // [images, columns] of `type`, aligned to its size
  FeatureType type;
  const float* weights;                   // [images], at least 0; null: ones
  const float* centred;                   // [images, neurons]: weight times response minus the batch's mean response
  const float* shift;                     // [neurons]: mean response of the batch minus that of everything before
  double before, batch;                   // total weights; `batch` is the sum of `weights`
  std::int64_t images, columns, neurons;  // each at least 1
  double* mean;                           // [columns], updated
  double* m2;                             // [columns], updated
  float* cross;                           // [neurons, columns], updated
};

namespace cpu {

Status feature_moments(const FeatureMomentsArgs& args);

}  // namespace cpu

namespace cuda {

// Launches one kernel on a stream of a device and returns; allocates nothing, does not wait, can be captured in a graph
// (which then keeps `before` and `batch`). All addresses are of device memory.
Status feature_moments(const FeatureMomentsArgs& args, int device, void* stream);

}  // namespace cuda
}  // namespace cortexloop
