// Factorized readouts of feature maps, and their gradients.
//
//   y[b, t] = sum_c sum_s x[b, c, s] w[t, c, s],   w[t, c, s] = sum_r v[t, r, c] m[t, r, s]
//
// Rank 1: one image at a time, products x m summed over s for a block of channels, weighed by v on the way out; a [C, T] map is
// never larger than 64 x 64. Higher ranks: w of a few hundred features is made once, in cache, and multiplied with all images:
// `rank` times fewer multiplications. Gradients go by w, too: dx = g w; and g x, from which dm and dv follow block by block.
// Order: features in blocks that the shapes decide, inside a block one after the other, each neuron in a lane of its own.
#pragma once

#include <cstring>

#include "../readout_kernels.h"
#include "evolution.inl.h"
#include "gemm.inl.h"

namespace cortexloop {
namespace cpu {
namespace {

CL_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

CL_INLINE std::size_t float_bytes(std::int64_t count) { return static_cast<std::size_t>(count) * sizeof(float); }

// out[x][o] = sum_d a[x][d] b[d][o], o < vectors * kLanes.
CL_INLINE void multiply(const float* a, std::int64_t lda, std::int64_t rows, const float* b, std::int64_t ldb,
                        std::int64_t depth, std::int64_t vectors, float* out, std::int64_t ldo) {
  GemmArgs g = plain_product(&a, lda, &b, ldb, static_cast<std::int32_t>(depth), static_cast<std::int32_t>(rows));
  g.vectors = static_cast<std::int32_t>(vectors);
  g.out = out;
  g.out_vector_stride = kLanes;
  g.out_pixel_stride = ldo;
  gemm<ExactProduct>(g);
}

void readout_transpose(const float* rows, std::int64_t stride, std::int32_t count, std::int64_t length,
                       std::int32_t width, float* panel) {
  constexpr std::int64_t kLine = 16;  // a line of each row is read while it is in the first-level cache
  for (std::int64_t start = 0; start < length; start += kLine) {
    const std::int64_t end = smaller(length, start + kLine);
    for (std::int32_t t = 0; t < width; ++t) {
      if (t < count) {
        for (std::int64_t i = start; i < end; ++i) panel[i * width + t] = rows[t * stride + i];
      } else {
        for (std::int64_t i = start; i < end; ++i) panel[i * width + t] = 0.0f;
      }
    }
  }
}

void readout_image(const NeuronBlock& w, const float* image, float* products, float* out) {
  std::memset(out, 0, float_bytes(w.width));
  const std::int32_t vectors = w.width / kLanes;
  for (std::int64_t r = 0; r < w.rank; ++r) {
    for (std::int64_t s = 0; s < w.positions; s += kProductDepth) {
      const std::int64_t depth = smaller(kProductDepth, w.positions - s);
      const float* masks = w.masks + (r * w.positions + s) * w.width;
      for (std::int64_t c = 0; c < w.channels; c += kBlockNeurons) {
        const std::int64_t rows = smaller(kBlockNeurons, w.channels - c);
        multiply(image + c * w.positions + s, w.positions, rows, masks, w.width, depth, vectors, products, w.width);
        const float* weights = w.vectors + (r * w.channels + c) * w.width;
        for (std::int32_t v = 0; v < w.width; v += kLanes) {
          vf sum = vload(out + v);
          for (std::int64_t i = 0; i < rows; ++i) {
            sum = vfma(vload(weights + i * w.width + v), vload(products + i * w.width + v), sum);
          }
          vstore(out + v, sum);
        }
      }
    }
  }
}

// panel[i] = sum_r v[r, c] m[r, s] for `count` positions from s on; [count, width].
CL_INLINE void block_weights(const NeuronBlock& w, std::int64_t c, std::int64_t s, std::int64_t count, float* panel) {
  for (std::int32_t v = 0; v < w.width; v += kLanes) {
    for (std::int64_t r = 0; r < w.rank; ++r) {
      const vf weight = vload(w.vectors + (r * w.channels + c) * w.width + v);
      const float* CL_RESTRICT masks = w.masks + (r * w.positions + s) * w.width + v;
      float* CL_RESTRICT to = panel + v;
      if (r == 0) {
        for (std::int64_t i = 0; i < count; ++i) vstore(to + i * w.width, vmul(weight, vload(masks + i * w.width)));
      } else {
        for (std::int64_t i = 0; i < count; ++i) {
          vstore(to + i * w.width, vfma(weight, vload(masks + i * w.width), vload(to + i * w.width)));
        }
      }
    }
  }
}

void readout_images(const NeuronBlock& w, const float* features, std::int64_t batch, std::int64_t first,
                    std::int64_t last, float* panel, float* products, float* out) {
  std::memset(out, 0, float_bytes(batch * w.width));
  const std::int64_t stride = w.channels * w.positions;
  const std::int64_t together = w.positions < kProductDepth ? kProductDepth / w.positions : 1;  // channels in a panel
  for (std::int64_t c = first; c < last; c += together) {
    const std::int64_t channels = smaller(together, last - c);
    for (std::int64_t s = 0; s < w.positions; s += kProductDepth) {
      const std::int64_t count = smaller(kProductDepth, w.positions - s);
      for (std::int64_t i = 0; i < channels; ++i) block_weights(w, c + i, s, count, panel + i * count * w.width);
      multiply(features + c * w.positions + s, stride, batch, panel, w.width, channels * count, w.width / kLanes,
               products, w.width);
      for (std::int64_t i = 0; i < batch * w.width; i += kLanes) {
        vstore(out + i, vadd(vload(out + i), vload(products + i)));
      }
    }
  }
}

void readout_sum(const float* parts, std::int64_t n_parts, std::int64_t stride, std::int64_t count, float* out) {
  std::memcpy(out, parts, float_bytes(count));
  for (std::int64_t p = 1; p < n_parts; ++p) {
    const float* CL_RESTRICT part = parts + p * stride;
    for (std::int64_t i = 0; i < count; ++i) out[i] += part[i];
  }
}

// A run of positions of one channel among the features [first, first + count).
struct Run {
  std::int64_t channel, position, count;
};

CL_INLINE Run run_at(const FactorizedWeights& w, std::int64_t feature, std::int64_t end) {
  const std::int64_t position = feature % w.positions;
  return {feature / w.positions, position, smaller(w.positions - position, end - feature)};
}

void readout_back_features(const FactorizedReadoutGradientArgs& a, std::int64_t first, std::int32_t count,
                           std::int32_t columns, float* panel, float* tail) {
  const FactorizedWeights& w = a.weights;
  const std::int64_t stride = w.channels * w.positions, end = first + count;
  const std::int32_t whole = count / kLanes * kLanes, rest = count - whole;
  if (rest > 0) {  // lanes of the last vector that are no features of this block
    for (std::int64_t t = 0; t < w.neurons; ++t) std::memset(panel + t * columns + whole, 0, kLanes * sizeof(float));
  }
  for (std::int64_t feature = first; feature < end;) {
    const Run run = run_at(w, feature, end);
    for (std::int64_t t = 0; t < w.neurons; ++t) {
      float* CL_RESTRICT to = panel + t * columns + (feature - first);
      for (std::int64_t r = 0; r < w.rank; ++r) {
        const float weight = w.vectors[(t * w.rank + r) * w.channels + run.channel];
        const float* CL_RESTRICT mask = w.masks + (t * w.rank + r) * w.positions + run.position;
        if (r == 0) {
          for (std::int64_t i = 0; i < run.count; ++i) to[i] = weight * mask[i];
        } else {
          for (std::int64_t i = 0; i < run.count; ++i) to[i] = to[i] + weight * mask[i];
        }
      }
    }
    feature += run.count;
  }
  multiply(a.cotangent, w.neurons, a.batch, panel, columns, w.neurons, whole / kLanes, a.d_features + first, stride);
  if (rest > 0) {
    multiply(a.cotangent, w.neurons, a.batch, panel + whole, columns, w.neurons, 1, tail, kLanes);
    for (std::int64_t b = 0; b < a.batch; ++b) {
      std::memcpy(a.d_features + b * stride + first + whole, tail + b * kLanes, float_bytes(rest));
    }
  }
}

void readout_back_factors(const FactorizedReadoutGradientArgs& a, const float* cotangent, std::int64_t neuron,
                          std::int32_t count, std::int64_t first, std::int64_t last, float* panel, float* tail,
                          float* d_masks) {
  const FactorizedWeights& w = a.weights;
  const std::int64_t stride = w.channels * w.positions, end = last * w.positions;
  if (d_masks != nullptr) std::memset(d_masks, 0, float_bytes(count * w.rank * w.positions));
  for (std::int64_t start = first * w.positions; start < end; start += kColumns) {
    const std::int64_t columns = smaller(kColumns, end - start);
    const std::int64_t whole = columns / kLanes * kLanes, rest = columns - whole;
    const float* g = cotangent + neuron * a.batch;
    multiply(g, a.batch, count, a.features + start, stride, a.batch, whole / kLanes, panel, kColumns);
    if (rest > 0) {  // a whole vector would end behind the last image
      for (std::int64_t b = 0; b < a.batch; ++b) {
        std::memset(tail + b * kLanes, 0, kLanes * sizeof(float));
        std::memcpy(tail + b * kLanes, a.features + b * stride + start + whole, float_bytes(rest));
      }
      multiply(g, a.batch, count, tail, kLanes, a.batch, 1, panel + whole, kColumns);
    }
    for (std::int64_t feature = start; feature < start + columns;) {
      const Run run = run_at(w, feature, start + columns);
      for (std::int32_t t = 0; t < count; ++t) {
        const float* CL_RESTRICT row = panel + t * kColumns + (feature - start);
        for (std::int64_t r = 0; r < w.rank; ++r) {
          const std::int64_t factor = (neuron + t) * w.rank + r;
          const std::int64_t at = factor * w.channels + run.channel;
          if (a.d_vectors != nullptr) {
            const float product = dot(w.masks + factor * w.positions + run.position, row, run.count);
            a.d_vectors[at] = run.position == 0 ? product : a.d_vectors[at] + product;
          }
          if (d_masks != nullptr) {
            const float weight = w.vectors[at];
            float* CL_RESTRICT to = d_masks + (t * w.rank + r) * w.positions + run.position;
            for (std::int64_t i = 0; i < run.count; ++i) to[i] = to[i] + weight * row[i];
          }
        }
      }
      feature += run.count;
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
