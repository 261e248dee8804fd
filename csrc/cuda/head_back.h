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

struct BackLayout {
  std::int32_t operand1_stride, operand1_plane;  // the gradient of two rows of the second map; halves
  std::int32_t operand0_stride, operand0_plane;  // of two rows of the first map
  std::int32_t row_pixels;                       // of the first map, with those that fill the last tile
  std::int32_t ring2_width, ring1_width;         // pixels per row, with margins of zeros
  std::int32_t columns;                   // start of the products of two image rows [2, row_pixels, kColumnStride]
  std::int32_t bytes;                     // of all this; operands start at 0
  std::int32_t ring2_bytes, ring1_bytes;  // 3 rows, 4 rows
};

constexpr int kColumnStride = 17;  // 16 numbers per pixel, apart so that pixels fall into different banks

__host__ __device__ inline BackLayout back_layout(const HeadRecord& head, int width) {
  const int width1 = width / 2, width2 = width / 4;
  BackLayout l;
  l.operand1_stride = 16 * head.mix2.k_tiles + 8;
  l.operand1_plane = ceil_div(2 * width1, 16) * 16 * l.operand1_stride;
  l.operand0_stride = 16 * head.mix1.k_tiles + 8;
  l.row_pixels = ceil_div(width, 16) * 16;
  l.operand0_plane = 2 * l.row_pixels * l.operand0_stride;
  l.ring2_width = Exact::kColumns * ceil_div(width2, Exact::kColumns) + 2;
  l.ring1_width = Exact::kColumns * ceil_div(width1, Exact::kColumns) + 2;
  const auto lines = [](int bytes) { return ceil_div(bytes, 128) * 128; };
  const int larger = l.operand1_plane > l.operand0_plane ? l.operand1_plane : l.operand0_plane;
  l.columns = lines(2 * larger * 2);
  l.bytes = l.columns + lines(2 * l.row_pixels * kColumnStride * 4);
  l.ring2_bytes = lines(3 * l.ring2_width * head.taps2.pairs * 8);
  l.ring1_bytes = lines(4 * l.ring1_width * head.taps1.pairs * 8);
  return l;
}

// Whether a block covers the rows of these maps: each depthwise layer by its threads, tiles of 16 pixels by two warps.
inline bool fits_gradient(const HeadRecord& head, int width, int shared_bytes) {
  return ceil_div(width / 2, Exact::kColumns) * head.taps1.pairs <= Exact::kThreads &&
         ceil_div(width / 4, Exact::kColumns) * head.taps2.pairs <= Exact::kThreads &&
         2 * ceil_div(width, 16) <= Exact::kThreads / 32 && back_layout(head, width).bytes <= shared_bytes;
}

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
template <class Emit>
__device__ __forceinline__ void gather(const float2* const (&rows)[3], const bool (&there)[3], int stride,
                                       const float2* taps, int pairs, int column, const Emit& emit) {
  // One line after the other: the taps of both would not fit in registers beside the window.
#pragma unroll
  for (int line = 0; line < 2; ++line) {
    float2 tap[3][5];
#pragma unroll
    for (int i = 1 - line; i < 5; i += 2) {
#pragma unroll
      for (int j = 0; j < 5; ++j) tap[i / 2][j] = taps[(i * 5 + j) * pairs];
    }
    float2 window[3][3];  // output row, output column
#pragma unroll
    for (int r = 0; r < 2 + line; ++r) {
#pragma unroll
      for (int c = 1; c < 3; ++c) {
        if (there[r]) {
          window[r][c] = rows[r][(c - 1) * stride];
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
        if (there[r]) window[r][2] = rows[r][(u + 2) * stride];
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

  __device__ __forceinline__ void add(const BankRef& bank, const MatrixRecord& matrix, const __half* operand,
                                      const BackLayout& l, int m, int half, int lane) {
#pragma unroll 1
    for (int k = 0; k < matrix.k_tiles; ++k) {
      std::uint32_t a[2][2][4];  // row, plane
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const __half* from =
            operand + (r * l.row_pixels + m * 16 + (lane & 15)) * l.operand0_stride + k * 16 + (lane >> 4) * 8;
#pragma unroll
        for (int p = 0; p < 2; ++p) ldmatrix_x4(a[r][p], from + p * l.operand0_plane);
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
  __shared__ BackLayout l;
  const HeadRecord& head = model.head;
  const int height = images.height, width = images.width;
  const int height1 = height / 2, width1 = width / 2, height2 = height / 4, width2 = width / 4;
  if (threadIdx.x == 0) l = back_layout(head, width);
  __syncthreads();
  __half* operand = reinterpret_cast<__half*>(shared);
  for (int i = thread_index(); i < 3 * l.ring2_width * head.taps2.pairs; i += Exact::kThreads) set_zero(job.ring2[i]);
  for (int i = thread_index(); i < 4 * l.ring1_width * head.taps1.pairs; i += Exact::kThreads) set_zero(job.ring1[i]);
  __syncthreads();

  // Row q of the third map, through its pointwise layer.
  const auto mix2_back = [&](int q) {
    const int pairs = head.taps2.pairs;
    const float2* weights = bank.at<float2>(head.mix2_back);
    for (int i = thread_index(); i < width2 * pairs; i += Exact::kThreads) {
      const int x = i / pairs, pair = i - x * pairs;
      const float* from = job.grad2 + (q * width2 + x) * head.channels2;
      float2 sum = make_float2(0.0f, 0.0f);
      for (int o = 0; o < head.channels2; ++o) fused_add(sum, make_float2(from[o], from[o]), weights[o * pairs + pair]);
      job.ring2[(q % 3 * l.ring2_width + x + 1) * pairs + pair] = sum;
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
    const float2 scale = bank.at<float2>(head.first_back.scale)[column / 2];
    float* to = reinterpret_cast<float*>(shared + l.columns);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* at = to + (r * l.row_pixels + (warp >> 1) * 16 + (lane >> 2)) * kColumnStride + column;
      at[0] = sums.value[r][0] * scale.x * unscale;
      at[1] = sums.value[r][1] * scale.y * unscale;
      at[8 * kColumnStride] = sums.value[r][2] * scale.x * unscale;
      at[8 * kColumnStride + 1] = sums.value[r][3] * scale.y * unscale;
    }
  };
  const auto put_together = [&](int y) {
    if (y < 0) return;
    const float* from = reinterpret_cast<const float*>(shared + l.columns);
    for (int i = thread_index(); i < 2 * 3 * width; i += Exact::kThreads) {
      const int pixel = i / 3, c = i - 3 * pixel, r = pixel >= width ? 1 : 0, x = pixel - r * width;
      float sum = 0.0f;
#pragma unroll
      for (int dx = 0; dx < kFirstKernel; ++dx) {
        const int at = x - dx + 2;
        if (at >= 0 && at < width) sum += from[(r * l.row_pixels + at) * kColumnStride + 3 * dx + c];
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
            rows[r] = job.ring2 + ((q + 3) % 3 * l.ring2_width + share.column) * taps.pairs + share.pair;
          }
          gather(rows, there, taps.pairs, bank.at<float2>(taps.floats) + share.pair, taps.pairs, share.column,
                 [&](int line, int x, float2 value) {
                   if (x >= width1) return;
                   const std::uint8_t* mask = job.masks.second + ((2 * e + line) * width1 + x) * head.mix1.n_tiles;
                   if (share.live) value = masked(value, mask, share.pair, taps.unscale * job.scale1);
                   store_operand(operand + (line * width1 + x) * l.operand1_stride + 2 * share.pair, l.operand1_plane,
                                 value);
                 });
        }
      }
      __syncthreads();
      const float unscale = 1.0f / job.scale1;
      mix<Exact, 1, 3>(bank, head.mix1_back, operand, l.operand1_stride, l.operand1_plane, 2 * width1,
                       [&](int pixel, int pair, float x, float y) {
                         if (pixel >= 2 * width1) return;
                         const int line = pixel >= width1 ? 1 : 0, row = 2 * e + line;
                         job.ring1[(row % 4 * l.ring1_width + pixel - line * width1 + 1) * head.taps1.pairs + pair] =
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
            rows[r] = job.ring1 + ((q + 4) % 4 * l.ring1_width + share.column) * taps.pairs + share.pair;
          }
          gather(rows, there, taps.pairs, bank.at<float2>(taps.floats) + share.pair, taps.pairs, share.column,
                 [&](int line, int x, float2 value) {
                   if (x >= width) return;
                   const std::uint8_t* mask = job.masks.first + ((2 * m + line) * width + x) * head.first.n_tiles;
                   if (share.live) value = masked(value, mask, share.pair, taps.unscale * job.scale0);
                   store_operand(operand + (line * l.row_pixels + x) * l.operand0_stride + 2 * share.pair,
                                 l.operand0_plane, value);
                 });
        }
      }
      __syncthreads();
      const int thread = thread_index(), warp = thread >> 5;
      if (warp < 2 * ceil_div(width, 16)) {
        sums.add(bank, head.first_back, operand, l, warp >> 1, warp & 1, thread & 31);
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
