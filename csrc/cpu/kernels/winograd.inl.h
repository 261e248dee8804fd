// First layer, 5 x 5, stride 1, by one-dimensional Winograd (Toom-Cook) F(4, 5) along image rows.
//
//   four neighbouring outputs  y = A^T ( sum over 5 rows and 3 colours of (G w) * (B^T x) ),  x = 8 neighbouring pixels
//
// with the points 0, 1, -1, inf | 2, -2, 1/2, -1/2: 8 products where direct convolution needs 20. B^T x depends on no weights
// and is made once per image (`winograd_image_row`); G w is packed with the bank. The points run in two groups of four so that
// 4 points x T tiles x N vectors of channels fit the registers; the first group leaves its share of A^T in `partial`.
// Measured: 1.7x the FMA peak of direct convolution on layer 0; rounding error 3-4x that of the direct sum.
#pragma once

#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kTile = 4;  // outputs per tile
constexpr int kPoints = 8;
constexpr int kTileAlign = 16;  // tiles per row are padded to this

constexpr std::int32_t tiles_padded(std::int32_t width) {
  return ((width + kTile - 1) / kTile + kTileAlign - 1) / kTileAlign * kTileAlign;
}

// B^T of one row of one colour. `phase[r]` [tiles_p + kTileAlign]: padded pixel 4 t + r at index t. `out` [8, tiles_p].
inline void winograd_image_row(const float* const* phase, std::int32_t tiles_p, float* CL_RESTRICT out) {
  for (int t = 0; t < tiles_p; t += kLanes) {
    const vf d0 = vload(phase[0] + t), d1 = vload(phase[1] + t), d2 = vload(phase[2] + t), d3 = vload(phase[3] + t);
    const vf d4 = vload(phase[0] + t + 1), d5 = vload(phase[1] + t + 1);
    const vf d6 = vload(phase[2] + t + 1), d7 = vload(phase[3] + t + 1);
    const auto put = [&](int p, vf x) { vstore(out + p * tiles_p + t, x); };
    // Point a != 0 is (even part) + a * (odd part) of x (x^2 - b^2) (x^2 - c^2) (x + a), b and c the other two magnitudes.
    put(0, vfma(vset1(5.25f), vsub(d2, d4), vsub(d6, d0)));
    const vf even1 = vfma(vset1(-4.25f), d4, vadd(d2, d6)), odd1 = vfma(vset1(-4.25f), d3, vadd(d1, d5));
    put(1, vadd(even1, odd1));
    put(2, vsub(even1, odd1));
    put(3, vfma(vset1(5.25f), vsub(d3, d5), vsub(d7, d1)));
    const vf even2 = vfma(vset1(-1.25f), d4, vfma(vset1(0.25f), d2, d6));
    const vf odd2 = vfma(vset1(-1.25f), d3, vfma(vset1(0.25f), d1, d5));
    put(4, vfma(vset1(2.0f), odd2, even2));
    put(5, vfma(vset1(-2.0f), odd2, even2));
    const vf even3 = vfma(vset1(-5.0f), d4, vfma(vset1(4.0f), d2, d6));
    const vf odd3 = vfma(vset1(-5.0f), d3, vfma(vset1(4.0f), d1, d5));
    put(6, vfma(vset1(0.5f), odd3, even3));
    put(7, vfma(vset1(-0.5f), odd3, even3));
  }
}

struct WinogradArgs {
  const float* image;  // [5, 3, 8, tiles_p]: five transformed rows; row r of them starts at r * 3 * 8 * tiles_p
  std::int32_t tiles_p;
  const float* weights;  // [2, 5, 3, 4, channels_p]
  std::int64_t channels_p;
  const float* bias;  // [channels_p]
  std::int32_t width, vectors;
  float* out;  // vector v of pixel x at out + v * out_vector_stride + x * kLanes
  std::int64_t out_vector_stride;
  std::uint16_t* mask;  // [vectors, mask_stride] or null
  std::int64_t mask_stride;
};

template <int T, int N>
CL_INLINE void winograd_sum(const WinogradArgs& w, int group, int t, int v, vf (&acc)[4][T][N]) {
  CL_UNROLL for (int p = 0; p < 4; ++p) {
    CL_UNROLL for (int k = 0; k < T; ++k) CL_UNROLL for (int n = 0; n < N; ++n) acc[p][k][n] = vzero();
  }
  const std::int64_t channels_p = w.channels_p, tiles_p = w.tiles_p;
  const float* CL_RESTRICT weights = w.weights + group * (5 * 3 * 4) * channels_p + v * kLanes;
  const float* CL_RESTRICT image = w.image + group * 4 * tiles_p + t;
  for (int row_colour = 0; row_colour < 5 * 3; ++row_colour) {
    CL_UNROLL for (int p = 0; p < 4; ++p) {
      vf u[N];
      CL_UNROLL for (int n = 0; n < N; ++n) {
        u[n] = vload(weights + n * kLanes);
        if (T > 1) vkeep(u[n]);
      }
      CL_UNROLL for (int k = 0; k < T; ++k) {
        const vf value = vset1(image[k]);
        CL_UNROLL for (int n = 0; n < N; ++n) acc[p][k][n] = vfma(value, u[n], acc[p][k][n]);
      }
      weights += channels_p;
      image += tiles_p;
    }
    image += 4 * tiles_p;
  }
}

// T tiles x N vectors of channels: 4 T output pixels.
template <int T, int N>
CL_NOINLINE void winograd_block(const WinogradArgs& w, int t, int v) {
  vf acc[4][T][N];
  alignas(64) float partial[T][N][4][kLanes];
  winograd_sum<T, N>(w, 0, t, v, acc);
  CL_UNROLL for (int k = 0; k < T; ++k) CL_UNROLL for (int n = 0; n < N; ++n) {
    const vf sum = vadd(acc[1][k][n], acc[2][k][n]), difference = vsub(acc[1][k][n], acc[2][k][n]);
    vstore(partial[k][n][0], vadd(acc[0][k][n], sum));
    vstore(partial[k][n][1], difference);
    vstore(partial[k][n][2], sum);
    vstore(partial[k][n][3], vadd(acc[3][k][n], difference));
  }
  winograd_sum<T, N>(w, 1, t, v, acc);
  CL_UNROLL for (int n = 0; n < N; ++n) {
    const vf bias = vload(w.bias + (v + n) * kLanes);
    CL_UNROLL for (int k = 0; k < T; ++k) {
      const vf sum2 = vadd(acc[0][k][n], acc[1][k][n]), difference2 = vsub(acc[0][k][n], acc[1][k][n]);
      const vf sum3 = vadd(acc[2][k][n], acc[3][k][n]), difference3 = vsub(acc[2][k][n], acc[3][k][n]);
      const vf y[kTile] = {
          vadd(vload(partial[k][n][0]), vadd(sum2, sum3)),
          vfma(vset1(2.0f), difference2, vfma(vset1(0.5f), difference3, vload(partial[k][n][1]))),
          vfma(vset1(4.0f), sum2, vfma(vset1(0.25f), sum3, vload(partial[k][n][2]))),
          vfma(vset1(8.0f), difference2, vfma(vset1(0.125f), difference3, vload(partial[k][n][3]))),
      };
      const int x0 = (t + k) * kTile;
      float* out = w.out + (v + n) * w.out_vector_stride + static_cast<std::int64_t>(x0) * kLanes;
      CL_UNROLL for (int i = 0; i < kTile; ++i) {
        if (x0 + i >= w.width) break;
        const vf activity = vrelu(vadd(y[i], bias));
        vstore(out + i * kLanes, activity);
        if (w.mask != nullptr) w.mask[(v + n) * w.mask_stride + x0 + i] = vpositive(activity);
      }
    }
  }
}

template <int T, int N>
void winograd_columns(const WinogradArgs& w, int v) {
  for (int t = 0; t * kTile < w.width; t += T) winograd_block<T, N>(w, t, v);
}

// One output row. The tile count of a block never passes the padded tiles: kTileAlign is a multiple of every T but 3.
inline void winograd_row(const WinogradArgs& w) {
  constexpr bool kMany = kRegisters >= 32;
  int v = 0;
  while (v < w.vectors) {
    const int left = w.vectors - v;
    if (left >= 3 && left != 4) {
      winograd_columns<kMany ? 2 : 1, 3>(w, v);
      v += 3;
    } else if (left >= 2) {
      winograd_columns<kMany ? 2 : 1, 2>(w, v);
      v += 2;
    } else {
      winograd_columns<kMany ? 4 : 2, 1>(w, v);
      v += 1;
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
