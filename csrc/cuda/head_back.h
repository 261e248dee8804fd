// Backwards through the head of a model of the published form: from the gradient of the third map to that of the image.
//
// Rows stream as in head.h, now from the third map down to the image. Each depthwise layer is transposed by gathering: rows
// 2m and 2m + 1 of its input take from rows m - 1, m, m + 1 of its output, of which a ring is kept. Pointwise layers and
// the first layer are products on tensor cores, in the exact precision. The first layer's is a product of a row of pixels
// [x, channels] with [channels, 5 x 16], one column for each tap and colour; five rows add up in registers, and the five
// columns of a kernel row are put together through shared memory.
#pragma once

#include "head.h"

namespace cortexloop::cuda {

// Where things lie in shared memory, as HeadShape. Operands, of two rows of the first or of the second map, start at 0.
struct BackShape {
  static constexpr int kColumns = Exact::kColumns, kWidth1 = kMaxWidth / 2, kWidth2 = kMaxWidth / 4;
  static constexpr int kOperandStride1 = 2 * kMaxPairs1 + 8, kOperandStride2 = 2 * kMaxPairs2 + 8;  // halves
  static constexpr int kOperandPlane1 = 2 * kMaxWidth * kOperandStride1;
  static constexpr int kOperandPlane2 = 2 * kWidth1 * kOperandStride2;
  static_assert(2 * kWidth1 % 16 == 0 && kMaxWidth % 16 == 0, "whole tiles of pixels");

  // Products of two image rows: 16 numbers per pixel, apart so that pixels fall into different banks.
  static constexpr int kProductStride = 17;
  static constexpr int kProducts = 4 * (kOperandPlane1 > kOperandPlane2 ? kOperandPlane1 : kOperandPlane2);
  static constexpr int kBytes = kProducts + 2 * kMaxWidth * kProductStride * 4;

  static_assert(kBytes <= kSharedOfEveryDevice, "every supported device runs heads backwards");
  static_assert(2 * (kMaxWidth / 16) <= Exact::kThreads / 32, "two warps for each tile of 16 pixels");

  // Rings of rows with margins of zeros: 3 rows of the gradient of what feeds mix2, 4 of what feeds mix1.
  static constexpr int kRow1 = kColumns * ceil_div(kWidth1, kColumns) + 2;
  static constexpr int kRow2 = kColumns * ceil_div(kWidth2, kColumns) + 2;
  static constexpr int kRing1 = 4 * kRow1 * kMaxPairs1, kRing2 = 3 * kRow2 * kMaxPairs2;  // pairs
  static constexpr int kRingBytes = 8 * (kRing1 + kRing2);
};

// What one call of head_backward does. The gradient of the third map [height / 4, width / 4, channels2] is masked
// already. `grad` gets [height, width, 3] with these strides.
struct BackJob {
  const float* grad2;
  float scale1, scale0;  // of the gradients of the second and the first map, as operands
  HeadMasks masks;
  float2* ring2;
  float2* ring1;
  float* grad;
  std::int64_t stride_y, stride_x, stride_c;
};

// Rows 2m and 2m + 1 of the input of a depthwise layer of stride 2, from rows m - 1, m, m + 1 of its output. `rows` points
// at the thread's pair of channels one column left of its first one, `there` tells rows from absent ones; `emit(line, x,
// value)` gets two columns for each of the thread's.
template <int kPairs, class Emit>
__device__ __forceinline__ void gather(const float2* const (&rows)[3], const bool (&there)[3], const float2* taps,
                                       int column, const Emit& emit) {
  // One line after the other: the taps of both would not fit in registers beside the window.
#pragma unroll
  for (int line = 0; line < 2; ++line) {
    float2 tap[3][5];
#pragma unroll
    for (int i = 1 - line; i < 5; i += 2) {
#pragma unroll
      for (int j = 0; j < 5; ++j) tap[i / 2][j] = taps[(i * 5 + j) * kPairs];
    }
    float2 window[3][3];  // output row, output column
#pragma unroll
    for (int r = 0; r < 2 + line; ++r) {
#pragma unroll
      for (int c = 1; c < 3; ++c) {
        if (there[r]) {
          window[r][c] = rows[r][(c - 1) * kPairs];
        } else {
          set_zero(window[r][c]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < Exact::kColumns; ++u) {
#pragma unroll
      for (int r = 0; r < 2 + line; ++r) {
        window[r][0] = window[r][1];
        window[r][1] = window[r][2];
        if (there[r]) window[r][2] = rows[r][(u + 2) * kPairs];
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 1 - line; i < 5; i += 2) {
#pragma unroll
          for (int j = 1 - side; j < 5; j += 2) {
            fused_add(sum, tap[i / 2][j], window[2 - (i + 1) / 2][2 - (j + 1) / 2]);
          }
        }
        emit(line, 2 * (column + u) + side, sum);
      }
    }
  }
}

// A pair of channels where the ReLU let it through, times `scale`.
__device__ __forceinline__ float2 masked(float2 x, const std::uint8_t* mask, int pair, float scale) {
  const int byte = mask[pair / 4] >> (2 * (pair % 4));
  return make_float2((byte & 1) != 0 ? x.x * scale : 0.0f, (byte & 2) != 0 ? x.y * scale : 0.0f);
}

// Products of two rows of the gradient of the first map, y = 2m and 2m + 1, that reach image rows 2m - 2 .. 2m + 3. A warp
// has 16 pixels and half of the columns of every kernel row.
struct ImageSums {
  float value[6][4];  // image row, accumulator

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 6; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) value[r][e] = 0.0f;
    }
  }

  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int r = 0; r < 6; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) value[r][e] = r < 4 ? value[r + 2][e] : 0.0f;
    }
  }

  __device__ __forceinline__ void add(const BankRef& bank, const MatrixRecord& matrix, const __half* operand, int m,
                                      int half, int lane) {
#pragma unroll 1
    for (int k = 0; k < matrix.k_tiles; ++k) {
      std::uint32_t a[2][2][4];  // row, plane
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const __half* from =
            operand + (r * kMaxWidth + m * 16 + (lane & 15)) * BackShape::kOperandStride1 + k * 16 + (lane >> 4) * 8;
#pragma unroll
        for (int p = 0; p < 2; ++p) ldmatrix_x4(a[r][p], from + p * BackShape::kOperandPlane1);
      }
#pragma unroll
      for (int dy = 0; dy < kFirstKernel; ++dy) {
        const uint2* b = bank.at<uint2>(matrix.fragments) + ((2 * dy + half) * matrix.k_tiles + k) * 32 + lane;
        const uint2 high = b[0], low = b[matrix.n_tiles * matrix.k_tiles * 32];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          mma_16816(value[dy + r], a[r][0], high.x, high.y);
          mma_16816(value[dy + r], a[r][0], low.x, low.y);
          mma_16816(value[dy + r], a[r][1], high.x, high.y);
        }
      }
    }
  }
};

// Ends with a barrier.
__device__ __forceinline__ void head_backward(const BankRef& bank, const ModelRecord& model, const ImagesRef& images,
                                              unsigned char* shared, const BackJob& job) {
  using Shape = BackShape;
  const HeadRecord& head = model.head;
  const int height = images.height, width = images.width;
  const int height1 = height / 2, width1 = width / 2, height2 = height / 4, width2 = width / 4;
  __half* operand = reinterpret_cast<__half*>(shared);
  for (int i = thread_index(); i < Shape::kRing2; i += Exact::kThreads) set_zero(job.ring2[i]);
  for (int i = thread_index(); i < Shape::kRing1; i += Exact::kThreads) set_zero(job.ring1[i]);
  __syncthreads();

  // Row q of the third map, through its pointwise layer.
  const auto mix2_back = [&](int q) {
    const int pairs = head.taps2.pairs;
    const float2* weights = bank.at<float2>(head.mix2_back);
    for (int i = thread_index(); i < width2 * pairs; i += Exact::kThreads) {
      const int x = i / pairs, pair = i - x * pairs;
      const float* from = job.grad2 + (q * width2 + x) * head.channels2;
      float2 sum = make_float2(0.0f, 0.0f);
      for (int o = 0; o < head.channels2; ++o)
        fused_add(sum, make_float2(from[o], from[o]), weights[o * kMaxPairs2 + pair]);
      job.ring2[(q % 3 * Shape::kRow2 + x + 1) * kMaxPairs2 + pair] = sum;
    }
  };
  // Two image rows from the sums' first two.
  ImageSums sums;
  sums.clear();
  const auto lay_out = [&]() {
    const int thread = thread_index(), lane = thread & 31, warp = thread >> 5;
    if (warp >= 2 * ceil_div(width, 16)) return;
    const float unscale = 1.0f / job.scale0;
    const int column = (warp & 1) * 8 + 2 * (lane & 3);
    const float4 scale = bank.at<float4>(head.first_back.outputs)[column / 2];
    float* to = reinterpret_cast<float*>(shared + Shape::kProducts);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* at = to + (r * kMaxWidth + (warp >> 1) * 16 + (lane >> 2)) * Shape::kProductStride + column;
      at[0] = sums.value[r][0] * scale.x * unscale;
      at[1] = sums.value[r][1] * scale.y * unscale;
      at[8 * Shape::kProductStride] = sums.value[r][2] * scale.x * unscale;
      at[8 * Shape::kProductStride + 1] = sums.value[r][3] * scale.y * unscale;
    }
  };
  const auto put_together = [&](int y) {
    if (y < 0) return;
    const float* from = reinterpret_cast<const float*>(shared + Shape::kProducts);
    for (int i = thread_index(); i < 2 * 3 * width; i += Exact::kThreads) {
      const int pixel = i / 3, c = i - 3 * pixel, r = pixel >= width ? 1 : 0, x = pixel - r * width;
      float sum = 0.0f;
#pragma unroll
      for (int dx = 0; dx < kFirstKernel; ++dx) {
        const int at = x - dx + 2;
        if (at >= 0 && at < width) sum += from[(r * kMaxWidth + at) * Shape::kProductStride + 3 * dx + c];
      }
      job.grad[(y + r) * job.stride_y + x * job.stride_x + c * job.stride_c] = sum;
    }
  };

  mix2_back(0);
#pragma unroll 1
  for (int e = 0; e <= height2; ++e) {
    if (e < height2) {
      if (e + 1 < height2) mix2_back(e + 1);
      __syncthreads();
      {  // Rows 2e and 2e + 1 of the second map.
        const TapsRecord& taps = head.taps2;
        const Share share(taps, head.mix1.n_tiles * 4, Exact::kColumns, width2);
        if (share.any) {
          const float2* rows[3];
          bool there[3];
#pragma unroll
          for (int r = 0; r < 3; ++r) {
            const int q = e - 1 + r;
            there[r] = share.live && q >= 0 && q < height2;
            rows[r] = job.ring2 + ((q + 3) % 3 * Shape::kRow2 + share.column) * kMaxPairs2 + share.pair;
          }
          gather<kMaxPairs2>(
              rows, there, bank.at<float2>(taps.floats) + share.pair, share.column, [&](int line, int x, float2 value) {
                if (x >= width1) return;
                const std::uint8_t* mask = job.masks.second + ((2 * e + line) * width1 + x) * head.mix1.n_tiles;
                if (share.live) value = masked(value, mask, share.pair, taps.unscale * job.scale1);
                store_operand(operand + (line * width1 + x) * Shape::kOperandStride2 + 2 * share.pair,
                              Shape::kOperandPlane2, value);
              });
        }
      }
      __syncthreads();
      const float unscale = 1.0f / job.scale1;
      mix<Exact, 1, 3, Shape::kOperandStride2, Shape::kOperandPlane2>(
          bank, head.mix1_back, operand, 2 * width1, [&](int pixel, int pair, float x, float y) {
            if (pixel >= 2 * width1) return;
            const int line = pixel >= width1 ? 1 : 0, row = 2 * e + line;
            job.ring1[(row % 4 * Shape::kRow1 + pixel - line * width1 + 1) * kMaxPairs1 + pair] =
                make_float2(x * unscale, y * unscale);
          });
      __syncthreads();
    }
    // Two more rows of the second map complete two pairs of rows of the first one; its last pair waits for the row behind.
#pragma unroll 1
    for (int row1 = 2 * e; row1 < min(2 * e + 2, height1 + 1); ++row1) {
      const int m = row1 - 1;
      if (m < 0) continue;
      {
        const TapsRecord& taps = head.taps1;
        const Share share(taps, head.first.n_tiles * 4, Exact::kColumns, width1);
        if (share.any) {
          const float2* rows[3];
          bool there[3];
#pragma unroll
          for (int r = 0; r < 3; ++r) {
            const int q = m - 1 + r;
            there[r] = share.live && q >= 0 && q < height1;
            rows[r] = job.ring1 + ((q + 4) % 4 * Shape::kRow1 + share.column) * kMaxPairs1 + share.pair;
          }
          gather<kMaxPairs1>(
              rows, there, bank.at<float2>(taps.floats) + share.pair, share.column, [&](int line, int x, float2 value) {
                if (x >= width) return;
                const std::uint8_t* mask = job.masks.first + ((2 * m + line) * width + x) * head.first.n_tiles;
                if (share.live) value = masked(value, mask, share.pair, taps.unscale * job.scale0);
                store_operand(operand + (line * kMaxWidth + x) * Shape::kOperandStride1 + 2 * share.pair,
                              Shape::kOperandPlane1, value);
              });
        }
      }
      __syncthreads();
      const int thread = thread_index(), warp = thread >> 5;
      if (warp < 2 * ceil_div(width, 16)) {
        sums.add(bank, head.first_back, operand, warp >> 1, warp & 1, thread & 31);
      }
      lay_out();
      sums.advance();
      __syncthreads();
      put_together(2 * m - 2);
    }
  }
  __syncthreads();
  lay_out();
  __syncthreads();
  put_together(height - 2);
  __syncthreads();
}

}  // namespace cortexloop::cuda
