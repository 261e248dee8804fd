// Readouts that look at one point of a feature map, and their gradients.
//
//   y[b, t] = sum_c v[t, c] sum_k weight[k] x[b, c, tap k],   k = 0..3
//
// One map after the other is in cache while all neurons read their taps from it: two pairs of neighbours, so two loads. The four
// sums over channels of a neuron stay apart until the end: with the derivatives of the weights they give the gradient by position.
// Order: channels one after the other, then (tap 0 + tap 1) + (tap 2 + tap 3). Scattering goes by neurons, one after the other.
#pragma once

#include <cstring>

#include "../readout_kernels.h"
#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr std::int32_t kMaps =
    4;  // maps read at a time: the sums of a neuron are loaded and stored once for all of them

// Position p in pixels, 0 the centre of the first.
CL_INLINE float pixel_of(float p, std::int64_t size, bool align_corners) {
  const auto n = static_cast<float>(size);
  return align_corners ? (p + 1.0f) / 2.0f * (n - 1.0f) : ((p + 1.0f) * n - 1.0f) / 2.0f;
}

// The taps along one axis: pixels first and first + 1 with their weights and derivatives.
struct AxisTaps {
  std::int32_t first;
  float weight[2], slope[2];
};

CL_INLINE AxisTaps axis_taps(float p, std::int64_t size, bool align_corners) {
  AxisTaps taps = {0, {0.0f, 0.0f}, {0.0f, 0.0f}};
  const float pixel = pixel_of(p, size, align_corners);
  const float undefined = pixel - pixel;  // 0, or NaN for NaN and infinity, which stay visible
  if (undefined != 0.0f) {
    taps.weight[0] = taps.weight[1] = taps.slope[0] = taps.slope[1] = undefined;
    return taps;
  }
  if (pixel < -1.0f || pixel >= static_cast<float>(size)) return taps;
  const auto before = static_cast<std::int32_t>(pixel + 1.0f) - 1;  // floor: pixel + 1 is at least 0
  const std::int32_t below = static_cast<float>(before) > pixel ? before - 1 : before;  // pixel + 1 may round up
  const float weight[2] = {static_cast<float>(below + 1) - pixel, pixel - static_cast<float>(below)};
  const auto last = static_cast<std::int32_t>(size) - 1;
  taps.first = below < 0 ? 0 : (below > last - 1 ? (last > 0 ? last - 1 : 0) : below);
  for (std::int32_t k = 0; k < 2; ++k) {
    const std::int32_t at = below + k;
    if (at < 0 || at > last) continue;
    taps.weight[at - taps.first] = weight[k];
    taps.slope[at - taps.first] = k == 0 ? -1.0f : 1.0f;
  }
  return taps;
}

TapSteps point_taps(const PointReadoutShape& shape, const float* positions, const PointTaps& taps) {
  for (std::int64_t t = 0; t < shape.neurons; ++t) {
    const AxisTaps x = axis_taps(positions[2 * t], shape.width, shape.align_corners);
    const AxisTaps y = axis_taps(positions[2 * t + 1], shape.height, shape.align_corners);
    taps.base[t] = y.first * static_cast<std::int32_t>(shape.width) + x.first;
    for (int k = 0; k < 4; ++k) {
      taps.weights[4 * t + k] = y.weight[k / 2] * x.weight[k % 2];
      if (taps.by_x != nullptr) taps.by_x[4 * t + k] = y.weight[k / 2] * x.slope[k % 2];
      if (taps.by_y != nullptr) taps.by_y[4 * t + k] = y.slope[k / 2] * x.weight[k % 2];
    }
  }
  return {shape.width > 1 ? 1 : 0, shape.height > 1 ? static_cast<std::int32_t>(shape.width) : 0};
}

// The four taps from p on. Maps of one column have no right neighbours: those taps weigh nothing and repeat the left ones.
template <bool kPairs>
CL_INLINE v4 load_taps(const float* p, TapSteps steps) {
  if (kPairs) return v4_pairs(p, p + steps.row);
  const float taps[4] = {p[0], p[0], p[steps.row], p[steps.row]};
  return v4_load(taps);
}

template <bool kPairs, int kCount>
CL_INLINE void sums_of_maps(std::int64_t map_size, const float* map, TapSteps steps,
                            const std::int32_t* CL_RESTRICT base, const float* CL_RESTRICT vectors, std::int64_t stride,
                            std::int64_t count, float* CL_RESTRICT sums) {
  for (std::int64_t t = 0; t < count; ++t) {
    v4 sum = v4_load(sums + 4 * t);
    const float* taps = map + base[t];
    CL_UNROLL for (int i = 0; i < kCount; ++i) {
      sum = v4_fma(v4_set1(vectors[t * stride + i]), load_taps<kPairs>(taps + i * map_size, steps), sum);
    }
    v4_store(sums + 4 * t, sum);
  }
}

template <bool kPairs>
CL_INLINE void sums_of_image(const PointReadoutShape& shape, const float* image, TapSteps steps,
                             const std::int32_t* base, const float* vectors, std::int64_t count, float* sums) {
  const std::int64_t size = shape.height * shape.width;
  std::int64_t c = 0;
  for (; c + kMaps <= shape.channels; c += kMaps) {
    sums_of_maps<kPairs, kMaps>(size, image + c * size, steps, base, vectors + c, shape.channels, count, sums);
  }
  for (; c < shape.channels; ++c) {
    sums_of_maps<kPairs, 1>(size, image + c * size, steps, base, vectors + c, shape.channels, count, sums);
  }
}

void point_sums(const PointReadoutShape& shape, const float* image, TapSteps steps, const std::int32_t* base,
                const float* vectors, std::int64_t count, float* sums) {
  std::memset(sums, 0, static_cast<std::size_t>(4 * count) * sizeof(float));
  if (steps.column == 1) {
    sums_of_image<true>(shape, image, steps, base, vectors, count, sums);
  } else {
    sums_of_image<false>(shape, image, steps, base, vectors, count, sums);
  }
}

template <bool kPairs>
CL_INLINE void add_taps(std::int64_t neurons, const float* map, TapSteps steps, const std::int32_t* CL_RESTRICT base,
                        const float* CL_RESTRICT weights, float* CL_RESTRICT sums) {
  for (std::int64_t t = 0; t < neurons; ++t) {
    const v4 taps = load_taps<kPairs>(map + base[t], steps);
    v4_store(sums + 4 * t, v4_fma(v4_load(weights + 4 * t), taps, v4_load(sums + 4 * t)));
  }
}

void point_features(const PointReadoutShape& shape, const float* map, std::int32_t count, TapSteps steps,
                    const std::int32_t* base, const float* weights, float* sums) {
  const std::int64_t size = shape.height * shape.width, n = shape.neurons;
  for (std::int32_t i = 0; i < count; ++i) {
    if (steps.column == 1) {
      add_taps<true>(n, map + i * size, steps, base, weights, sums + i * 4 * n);
    } else {
      add_taps<false>(n, map + i * size, steps, base, weights, sums + i * 4 * n);
    }
  }
}

// The two rows one after the other: in a map of one row they are the same place.
template <bool kPairs>
CL_INLINE void scatter_taps(float* p, std::int32_t row, v4 add) {
  if (kPairs) {
    v4_store_low(p, v4_add(v4_pairs(p, p), add));
    v4_store_high(p + row, v4_add(v4_pairs(p + row, p + row), add));
  } else {
    float taps[4];
    v4_store(taps, add);
    p[0] += taps[0];
    p[row] += taps[2];
  }
}

template <bool kPairs>
CL_INLINE void scatter(const PointReadoutShape& shape, std::int32_t count, TapSteps steps, const std::int32_t* base,
                       const float* vectors, const float* weights, float* map) {
  const std::int64_t size = shape.height * shape.width;
  for (std::int64_t t = 0; t < shape.neurons; ++t) {
    const v4 weight = v4_load(weights + 4 * t);
    for (std::int32_t i = 0; i < count; ++i) {
      const v4 add = v4_mul(v4_set1(vectors[t * shape.channels + i]), weight);
      scatter_taps<kPairs>(map + i * size + base[t], steps.row, add);
    }
  }
}

void point_scatter(const PointReadoutShape& shape, std::int32_t count, TapSteps steps, const std::int32_t* base,
                   const float* vectors, const float* weights, float* map) {
  const std::int64_t size = shape.height * shape.width;
  std::memset(map, 0, static_cast<std::size_t>(count * size) * sizeof(float));
  if (steps.column == 1) {
    scatter<true>(shape, count, steps, base, vectors, weights, map);
  } else {
    scatter<false>(shape, count, steps, base, vectors, weights, map);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
