// Factorized readouts of feature maps, and their gradients.
//
//   y[b, t] = sum_c sum_s x[b, c, s] w[t, c, s],   w[t, c, s] = sum_r v[t, r, c] m[t, r, s]
//
// Rank 1: one image at a time, products x m summed over s for a block of channels, weighed by v on the way out; a [C, T] map is
// never larger than 64 x 64. Higher ranks: w of a hundred features is made once, in cache, and multiplied with all images:
// `rank` times fewer multiplications. So does dx = g w. For dm and dv, g x of a hundred features is made for all images together.
// Order: features in blocks that the shapes decide, inside a block one after the other, each neuron in a lane of its own.
#pragma once

#include <cstring>

#include "../readout_kernels.h"
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
  constexpr std::int64_t kLineFloats = 16;  // a line of each row is read while it is in the first-level cache
  for (std::int64_t start = 0; start < length; start += kLineFloats) {
    const std::int64_t end = smaller(length, start + kLineFloats);
    for (std::int32_t t = 0; t < width; ++t) {
      if (t < count) {
        for (std::int64_t i = start; i < end; ++i) panel[i * width + t] = rows[t * stride + i];
      } else {
        for (std::int64_t i = start; i < end; ++i) panel[i * width + t] = 0.0f;
      }
    }
  }
}

void readout_back_transpose(const float* panel, std::int32_t width, std::int32_t count, std::int64_t length,
                            std::int64_t stride, float* rows) {
  constexpr std::int64_t kLineFloats = 16;
  for (std::int64_t start = 0; start < length; start += kLineFloats) {
    const std::int64_t end = smaller(length, start + kLineFloats);
    for (std::int32_t t = 0; t < count; ++t) {
      for (std::int64_t i = start; i < end; ++i) rows[t * stride + i] = panel[i * width + t];
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

// to[i] = sum of kTerms weights[k] * rows[k][i], added to what is there if `add`; kVectors neighbours of each row at a time.
template <int kTerms, int kVectors>
CL_INLINE void weigh_rows(const float* weights, std::int64_t weight_stride, const float* CL_RESTRICT rows,
                          std::int64_t row_stride, std::int64_t width, std::int64_t count, bool add,
                          float* CL_RESTRICT to) {
  vf w[kTerms][kVectors];
  CL_UNROLL for (int k = 0; k < kTerms; ++k) {
    CL_UNROLL for (int v = 0; v < kVectors; ++v) w[k][v] = vload(weights + k * weight_stride + v * kLanes);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    CL_UNROLL for (int v = 0; v < kVectors; ++v) {
      const float* at = rows + i * width + v * kLanes;
      float* out = to + i * width + v * kLanes;
      vf sum = add ? vfma(w[0][v], vload(at), vload(out)) : vmul(w[0][v], vload(at));
      CL_UNROLL for (int k = 1; k < kTerms; ++k) sum = vfma(w[k][v], vload(at + k * row_stride), sum);
      vstore(out, sum);
    }
  }
}

constexpr int kTogether = kRegisters >= 32 ? 4 : 2;  // vectors: with four factors, half of the registers hold weights

template <int kTerms>
CL_INLINE void weigh_factors(const NeuronBlock& w, std::int64_t r, std::int64_t c, std::int64_t s, std::int64_t count,
                             float* panel) {
  const float* weights = w.vectors + (r * w.channels + c) * w.width;
  const float* rows = w.masks + (r * w.positions + s) * w.width;
  const std::int64_t weight_stride = w.channels * w.width, row_stride = w.positions * w.width;
  std::int32_t v = 0;
  for (; v + kTogether * kLanes <= w.width; v += kTogether * kLanes) {
    weigh_rows<kTerms, kTogether>(weights + v, weight_stride, rows + v, row_stride, w.width, count, r > 0, panel + v);
  }
  for (; v < w.width; v += kLanes) {
    weigh_rows<kTerms, 1>(weights + v, weight_stride, rows + v, row_stride, w.width, count, r > 0, panel + v);
  }
}

// panel[i] = sum_r v[r, c] m[r, s + i], [count, width]; four factors at a time.
CL_NOINLINE void block_weights(const NeuronBlock& w, std::int64_t c, std::int64_t s, std::int64_t count, float* panel) {
  for (std::int64_t r = 0; r < w.rank; r += 4) {
    switch (smaller(4, w.rank - r)) {
      case 1: weigh_factors<1>(w, r, c, s, count, panel); break;
      case 2: weigh_factors<2>(w, r, c, s, count, panel); break;
      case 3: weigh_factors<3>(w, r, c, s, count, panel); break;
      default: weigh_factors<4>(w, r, c, s, count, panel);
    }
  }
}

void readout_images(const NeuronBlock& w, const FeatureGroups& groups, const float* features, std::int64_t batch,
                    std::int64_t first, std::int64_t last, float* panel, float* products, float* out) {
  std::memset(out, 0, float_bytes(batch * w.width));
  const std::int64_t stride = w.channels * w.positions;
  const float* a[kPanelDepth];
  const float* b[kPanelDepth];
  for (std::int64_t c = first; c < last; c += groups.channels) {
    const std::int64_t channels = smaller(groups.channels, last - c);
    for (std::int64_t s = 0; s < w.positions; s += groups.positions) {
      const std::int64_t count = smaller(groups.positions, w.positions - s);
      const bool whole = count == w.positions;  // then channels follow each other in memory
      for (std::int64_t i = 0; i < channels; ++i) {
        a[i] = features + (c + i) * w.positions + s;
        b[i] = panel + i * count * w.width;
        block_weights(w, c + i, s, count, panel + i * count * w.width);
      }
      GemmArgs g = plain_product(a, stride, b, w.width, static_cast<std::int32_t>(whole ? channels * count : count),
                                 static_cast<std::int32_t>(batch));
      g.segments = whole ? 1 : static_cast<std::int32_t>(channels);
      g.vectors = w.width / kLanes;
      g.out = products;
      g.out_vector_stride = kLanes;
      g.out_pixel_stride = w.width;
      gemm<ExactProduct>(g);
      for (std::int64_t i = 0; i < batch * w.width; i += kLanes) {
        vstore(out + i, vadd(vload(out + i), vload(products + i)));
      }
    }
  }
}

void readout_add(const float* parts, std::int64_t n_parts, std::int64_t stride, std::int64_t count, float* out) {
  for (std::int64_t p = 0; p < n_parts; ++p) {
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
      const float* vectors = w.vectors + t * w.rank * w.channels + run.channel;
      const float* masks = w.masks + t * w.rank * w.positions + run.position;
      float* CL_RESTRICT to = panel + t * columns + (feature - first);
      for (std::int64_t r = 0; r < w.rank;) {
        const float* CL_RESTRICT mask = masks + r * w.positions;
        const float weight = vectors[r * w.channels];
        if (r == 0 && w.rank >= 3) {
          const float* CL_RESTRICT second = mask + w.positions;
          const float* CL_RESTRICT third = second + w.positions;
          const float weight2 = vectors[w.channels], weight3 = vectors[2 * w.channels];
          for (std::int64_t i = 0; i < run.count; ++i) {
            to[i] = (weight * mask[i] + weight2 * second[i]) + weight3 * third[i];
          }
          r += 3;
        } else if (r == 0) {
          for (std::int64_t i = 0; i < run.count; ++i) to[i] = weight * mask[i];
          ++r;
        } else {
          for (std::int64_t i = 0; i < run.count; ++i) to[i] = to[i] + weight * mask[i];
          ++r;
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

// Rank 1, one image, `rows` channels from c on: dx[c, s] = sum_t (g[t] v[t, c]) m[t, s]; masks in rows of `padded` numbers.
void readout_back_image(const FactorizedWeights& w, const float* masks, std::int64_t padded, const float* cotangent,
                        std::int64_t c, std::int64_t rows, float* weights, float* tail, float* out) {
  for (std::int64_t t = 0; t < w.neurons; ++t) {
    const float* vector = w.vectors + t * w.channels + c;
    for (std::int64_t i = 0; i < rows; ++i) weights[i * w.neurons + t] = cotangent[t] * vector[i];
  }
  const std::int64_t whole = w.positions / kLanes * kLanes, rest = w.positions - whole;
  multiply(weights, w.neurons, rows, masks, padded, w.neurons, whole / kLanes, out, w.positions);
  if (rest > 0) {
    multiply(weights, w.neurons, rows, masks + whole, padded, w.neurons, 1, tail, kLanes);
    for (std::int64_t i = 0; i < rows; ++i) {
      std::memcpy(out + i * w.positions + whole, tail + i * kLanes, float_bytes(rest));
    }
  }
}

// out[p][n] (+)= sum_d a[d * kColumns + p] b[d * ldb + n * kLanes]: neighbouring columns p in rows of a, P x N in registers.
template <int P, int N>
CL_INLINE void outer_block(const float* a, const float* b, std::int64_t ldb, std::int64_t depth, bool add, float* out) {
  vf acc[P][N];
  CL_UNROLL for (int p = 0; p < P; ++p) {
    CL_UNROLL for (int n = 0; n < N; ++n) acc[p][n] = add ? vload(out + p * ldb + n * kLanes) : vzero();
  }
  for (std::int64_t d = 0; d < depth; ++d) {
    vf row[N];
    CL_UNROLL for (int n = 0; n < N; ++n) {
      row[n] = vload(b + n * kLanes);
      vkeep(row[n]);
    }
    CL_UNROLL for (int p = 0; p < P; ++p) {
      const vf value = vset1(a[p]);
      CL_UNROLL for (int n = 0; n < N; ++n) acc[p][n] = vfma(value, row[n], acc[p][n]);
    }
    a += kColumns;
    b += ldb;
  }
  CL_UNROLL for (int p = 0; p < P; ++p) {
    CL_UNROLL for (int n = 0; n < N; ++n) vstore(out + p * ldb + n * kLanes, acc[p][n]);
  }
}

constexpr int kOuterColumns = 6;
static_assert(kColumns % kOuterColumns == 0, "columns come in whole blocks");

// panel[column][neuron] = sum over images of tile[image][column] cotangent[image][neuron].
void readout_outer(const float* tile, const float* cotangent, std::int32_t width, std::int64_t images,
                   std::int64_t columns, bool add, float* panel) {
  constexpr int kVectors = kRegisters >= 32 ? 4 : 2;
  for (std::int64_t column = 0; column < columns; column += kOuterColumns) {
    float* out = panel + column * width;
    std::int32_t v = 0;
    for (; v + kVectors * kLanes <= width; v += kVectors * kLanes) {
      outer_block<kOuterColumns, kVectors>(tile + column, cotangent + v, width, images, add, out + v);
    }
    for (; v < width; v += kLanes) {
      outer_block<kOuterColumns, 1>(tile + column, cotangent + v, width, images, add, out + v);
    }
  }
}

// kChannels channels, one factor, one vector of neurons: d_mask += vector * panel, d_vector += sum of mask * panel.
// Channels are `channel` apart in the panel, and `width` in the vectors.
template <int kChannels>
CL_INLINE void contract(const float* CL_RESTRICT panel, std::int64_t channel, const float* CL_RESTRICT mask,
                        const float* CL_RESTRICT vectors, std::int64_t width, std::int64_t count,
                        float* CL_RESTRICT d_mask, float* CL_RESTRICT d_vectors) {
  vf weight[kChannels], sum[kChannels];
  CL_UNROLL for (int k = 0; k < kChannels; ++k) {
    weight[k] = vload(vectors + k * width);
    sum[k] = vload(d_vectors + k * width);
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const vf of_mask = vload(mask + i * width);
    vf gradient = vload(d_mask + i * width);
    CL_UNROLL for (int k = 0; k < kChannels; ++k) {
      const vf value = vload(panel + k * channel + i * width);
      sum[k] = vfma(of_mask, value, sum[k]);
      gradient = vfma(weight[k], value, gradient);
    }
    vstore(d_mask + i * width, gradient);
  }
  CL_UNROLL for (int k = 0; k < kChannels; ++k) vstore(d_vectors + k * width, sum[k]);
}

void readout_contract(const NeuronBlock& w, const float* panel, std::int64_t c, std::int64_t channels, std::int64_t s,
                      std::int64_t count, float* d_masks, float* d_vectors) {
  for (std::int64_t r = 0; r < w.rank; ++r) {
    const std::int64_t mask = (r * w.positions + s) * w.width;
    for (std::int64_t k = 0; k < channels; k += kGroupChannels) {
      const std::int64_t at = (r * w.channels + c + k) * w.width, channel = count * w.width;
      for (std::int32_t v = 0; v < w.width; v += kLanes) {
        const float* values = panel + k * channel + v;
        const float *masks = w.masks + mask + v, *vectors = w.vectors + at + v;
        float *to_masks = d_masks + mask + v, *to_vectors = d_vectors + at + v;
        switch (smaller(kGroupChannels, channels - k)) {
          case 1: contract<1>(values, channel, masks, vectors, w.width, count, to_masks, to_vectors); break;
          case 2: contract<2>(values, channel, masks, vectors, w.width, count, to_masks, to_vectors); break;
          case 3: contract<3>(values, channel, masks, vectors, w.width, count, to_masks, to_vectors); break;
          default: contract<4>(values, channel, masks, vectors, w.width, count, to_masks, to_vectors);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
