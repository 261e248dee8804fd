// Depthwise convolution of one output row, and its transpose. Lanes are channels; P neighbouring pixels stay in registers.
//
//   forward     out[u][c] = sum_ij w[i][j][c] * in_i[u * S + j][c]
//   transposed  out[x][c] = sum_ij w[i][j][c] * in_i[(x - j) / S][c]   over the j for which the division is exact
//
// Columns are counted in the padded image, so that no tap depends on the padding. Each input vector is loaded once per
// block and used by every tap that needs it. Order of summation: i, then the input column.
#pragma once

#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

struct DepthwiseArgs {
  const float* rows[7];  // row of tap i at padded column 0 of vector 0; null: the row lies outside, contributes zero
  std::int64_t row_vector_stride;  // between vectors of channels; pixels are kLanes apart
  const float* weights;            // [k, k, channels_p]
  std::int64_t channels_p;
  std::int32_t kernel, stride, vectors;
  std::int32_t width;         // output pixels
  std::int32_t offset;        // transposed only: output pixel x lies at padded column x + offset
  float* out;                 // [width, channels_p]; with `pairs` bfloat16, [width, channels_p / 2] float slots
  bool pairs;                 // forward only: round the output to bfloat16 for the fast product
  const std::uint16_t* mask;  // transposed only: [vectors, mask_stride], zeroes the output where the bit is 0
  std::int64_t mask_stride;
};

template <int K, int S, int P>
CL_INLINE void depthwise_block(const DepthwiseArgs& d, int u, int v) {
  vf acc[P];
  CL_UNROLL for (int p = 0; p < P; ++p) acc[p] = vzero();
  for (int i = 0; i < K; ++i) {
    if (d.rows[i] == nullptr) continue;
    const float* in = d.rows[i] + v * d.row_vector_stride + static_cast<std::int64_t>(u) * S * kLanes;
    opaque(in);
    const float* weights = d.weights + i * K * d.channels_p + v * kLanes;
    opaque(weights);
    vf w[K];
    CL_UNROLL for (int j = 0; j < K; ++j) w[j] = vload(weights + j * d.channels_p);
    CL_UNROLL for (int q = 0; q < (P - 1) * S + K; ++q) {
      vf value = vload(in + q * kLanes);
      if (P > 1) vkeep(value);
      CL_UNROLL for (int j = 0; j < K; ++j) {
        const int p = (q - j) / S;
        if (q >= j && (q - j) % S == 0 && p < P) acc[p] = vfma(value, w[j], acc[p]);
      }
    }
  }
#if defined(CORTEXLOOP_ISA_BF16)
  if (d.pairs) {
    float* slots = d.out + (u * d.channels_p + v * kLanes) / 2;
    CL_UNROLL for (int p = 0; p < P; ++p) vstore_pairs(slots + p * d.channels_p / 2, acc[p]);
    return;
  }
#endif
  float* out = d.out + u * d.channels_p + v * kLanes;
  CL_UNROLL for (int p = 0; p < P; ++p) vstore(out + p * d.channels_p, acc[p]);
}

// Fourteen accumulators hide the latency of the multiply-adds (a pixel's taps are one dependent chain) and divide the
// published row widths; with 16 registers seven have to do.
template <int K, int S>
CL_NOINLINE void depthwise_row(const DepthwiseArgs& args) {
  const DepthwiseArgs d = args;  // a copy whose fields no vector store can alias
  constexpr int P = kRegisters >= 32 ? 14 : 7;
  for (int v = 0; v < d.vectors; ++v) {
    if (d.width < P) {
      for (int u = 0; u < d.width; ++u) depthwise_block<K, S, 1>(d, u, v);
      continue;
    }
    for (int u = 0; u < d.width; u += P) depthwise_block<K, S, P>(d, u + P <= d.width ? u : d.width - P, v);
  }
}

#if defined(CORTEXLOOP_ISA_BF16)
// Fast mode, stride 2, on rows of pixel pairs: rows[i] points to the pair with the first tap of output pixel 0, and
// out[u] = sum_i sum_m w[i][m] . in_i[u + m] with (k + 1) / 2 pair products per row instead of k.
template <int M, int P>
CL_INLINE void depthwise_pairs_block(const DepthwiseArgs& d, int u, int v) {
  vf acc[P];
  CL_UNROLL for (int p = 0; p < P; ++p) acc[p] = vzero();
  for (int i = 0; i < 2 * M - 1; ++i) {
    if (d.rows[i] == nullptr) continue;
    const float* in = d.rows[i] + v * d.row_vector_stride + static_cast<std::int64_t>(u) * kLanes;
    opaque(in);
    const float* weights = d.weights + i * M * d.channels_p + v * kLanes;
    opaque(weights);
    vf w[M];
    CL_UNROLL for (int m = 0; m < M; ++m) w[m] = vload(weights + m * d.channels_p);
    CL_UNROLL for (int q = 0; q < P + M - 1; ++q) {
      vf value = vload(in + q * kLanes);
      vkeep(value);
      CL_UNROLL for (int m = 0; m < M; ++m) {
        if (q >= m && q - m < P) acc[q - m] = vdot_pairs(value, w[m], acc[q - m]);
      }
    }
  }
  float* slots = d.out + (u * d.channels_p + v * kLanes) / 2;
  CL_UNROLL for (int p = 0; p < P; ++p) vstore_pairs(slots + p * d.channels_p / 2, acc[p]);
}

template <int M>
CL_NOINLINE void depthwise_pairs_row(const DepthwiseArgs& args) {
  const DepthwiseArgs d = args;  // a copy whose fields no vector store can alias
  constexpr int P = 8;
  for (int v = 0; v < d.vectors; ++v) {
    if (d.width < P) {
      for (int u = 0; u < d.width; ++u) depthwise_pairs_block<M, 1>(d, u, v);
      continue;
    }
    for (int u = 0; u < d.width; u += P) depthwise_pairs_block<M, P>(d, u + P <= d.width ? u : d.width - P, v);
  }
}

inline void depthwise_pairs(const DepthwiseArgs& d) {
  switch (d.kernel) {
    case 1: return depthwise_pairs_row<1>(d);
    case 3: return depthwise_pairs_row<2>(d);
    case 5: return depthwise_pairs_row<3>(d);
    default: return depthwise_pairs_row<4>(d);
  }
}
#endif

constexpr int kTransposedPixels = 8;

// Eight outputs from padded column `c0` (a multiple of the stride) on; input columns of a block are c0 / S + r.
template <int K, int S>
CL_INLINE void depthwise_transposed_block(const DepthwiseArgs& d, int c0, int v) {
  constexpr int P = kTransposedPixels;
  constexpr int kFirst = -((K - 1) / S);
  constexpr int kLast = (P - 1) / S;
  vf acc[P];
  CL_UNROLL for (int p = 0; p < P; ++p) acc[p] = vzero();
  for (int i = 0; i < K; ++i) {
    if (d.rows[i] == nullptr) continue;
    const float* in = d.rows[i] + v * d.row_vector_stride + static_cast<std::int64_t>(c0 / S) * kLanes;
    opaque(in);
    const float* weights = d.weights + i * K * d.channels_p + v * kLanes;
    opaque(weights);
    vf w[K];
    CL_UNROLL for (int j = 0; j < K; ++j) w[j] = vload(weights + j * d.channels_p);
    CL_UNROLL for (int r = kFirst; r <= kLast; ++r) {
      vf value = vload(in + r * kLanes);
      vkeep(value);
      CL_UNROLL for (int j = 0; j < K; ++j) {
        const int p = r * S + j;
        if (p >= 0 && p < P) acc[p] = vfma(value, w[j], acc[p]);
      }
    }
  }
  const int x0 = c0 - d.offset;
  CL_UNROLL for (int p = 0; p < P; ++p) {
    const int x = x0 + p;
    if (x < 0 || x >= d.width) continue;
    vstore(d.out + x * d.channels_p + v * kLanes, vwhere(d.mask[v * d.mask_stride + x], acc[p]));
  }
}

template <int K, int S>
CL_NOINLINE void depthwise_transposed_row(const DepthwiseArgs& args) {
  const DepthwiseArgs d = args;  // a copy whose fields no vector store can alias
  for (int v = 0; v < d.vectors; ++v) {
    for (int c0 = d.offset - d.offset % S; c0 < d.offset + d.width; c0 += kTransposedPixels) {
      depthwise_transposed_block<K, S>(d, c0, v);
    }
  }
}

inline void depthwise(const DepthwiseArgs& d) {
  switch (d.kernel * 2 + d.stride - 1) {
    case 2: return depthwise_row<1, 1>(d);
    case 3: return depthwise_row<1, 2>(d);
    case 6: return depthwise_row<3, 1>(d);
    case 7: return depthwise_row<3, 2>(d);
    case 10: return depthwise_row<5, 1>(d);
    case 11: return depthwise_row<5, 2>(d);
    case 14: return depthwise_row<7, 1>(d);
    default: return depthwise_row<7, 2>(d);
  }
}

inline void depthwise_transposed(const DepthwiseArgs& d) {
  switch (d.kernel * 2 + d.stride - 1) {
    case 2: return depthwise_transposed_row<1, 1>(d);
    case 3: return depthwise_transposed_row<1, 2>(d);
    case 6: return depthwise_transposed_row<3, 1>(d);
    case 7: return depthwise_transposed_row<3, 2>(d);
    case 10: return depthwise_transposed_row<5, 1>(d);
    case 11: return depthwise_transposed_row<5, 2>(d);
    case 14: return depthwise_transposed_row<7, 1>(d);
    default: return depthwise_transposed_row<7, 2>(d);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
