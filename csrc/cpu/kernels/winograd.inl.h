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
#include "gemm.inl.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kTile = 4;  // outputs per tile
constexpr int kPoints = 8;
constexpr int kTileAlign = 16;  // tiles per row are padded to this

constexpr std::int32_t tiles_padded(std::int32_t width) {
  return ((width + kTile - 1) / kTile + kTileAlign - 1) / kTileAlign * kTileAlign;
}

// B^T of 8 neighbouring values d. Point a != 0 is (even part) + a * (odd part) of x (x^2 - b^2) (x^2 - c^2) (x + a), with b
// and c the other two magnitudes.
CL_INLINE void winograd_input(const vf (&d)[kPoints], vf (&out)[kPoints]) {
  out[0] = vfma(vset1(5.25f), vsub(d[2], d[4]), vsub(d[6], d[0]));
  const vf even1 = vfma(vset1(-4.25f), d[4], vadd(d[2], d[6])), odd1 = vfma(vset1(-4.25f), d[3], vadd(d[1], d[5]));
  out[1] = vadd(even1, odd1);
  out[2] = vsub(even1, odd1);
  out[3] = vfma(vset1(5.25f), vsub(d[3], d[5]), vsub(d[7], d[1]));
  const vf even2 = vfma(vset1(-1.25f), d[4], vfma(vset1(0.25f), d[2], d[6]));
  const vf odd2 = vfma(vset1(-1.25f), d[3], vfma(vset1(0.25f), d[1], d[5]));
  out[4] = vfma(vset1(2.0f), odd2, even2);
  out[5] = vfma(vset1(-2.0f), odd2, even2);
  const vf even3 = vfma(vset1(-5.0f), d[4], vfma(vset1(4.0f), d[2], d[6]));
  const vf odd3 = vfma(vset1(-5.0f), d[3], vfma(vset1(4.0f), d[1], d[5]));
  out[6] = vfma(vset1(0.5f), odd3, even3);
  out[7] = vfma(vset1(-0.5f), odd3, even3);
}

// B^T of one row of one colour. `phase[r]` [tiles_p + kTileAlign]: padded pixel 4 t + r at index t. `out` [8, tiles_p].
inline void winograd_image_row(const float* const* phase, std::int32_t tiles_p, float* CL_RESTRICT out) {
  for (int t = 0; t < tiles_p; t += kLanes) {
    vf d[kPoints], transformed[kPoints];
    CL_UNROLL for (int q = 0; q < kPoints; ++q) d[q] = vload(phase[q % kTile] + t + q / kTile);
    winograd_input(d, transformed);
    CL_UNROLL for (int p = 0; p < kPoints; ++p) vstore(out + p * tiles_p + t, transformed[p]);
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
  bool pairs;           // fast mode: two neighbouring pixels in bfloat16 to a slot, pair x at x * kLanes; no mask
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

// A^T, first group of points (m0, m1, m-1, inf) and second group (m2, m-2, m1/2, m-1/2) added to it.
CL_INLINE void winograd_output_first(vf m0, vf m1, vf m1n, vf inf, vf (&y)[kTile]) {
  const vf sum = vadd(m1, m1n), difference = vsub(m1, m1n);
  y[0] = vadd(m0, sum);
  y[1] = difference;
  y[2] = sum;
  y[3] = vadd(inf, difference);
}

CL_INLINE void winograd_output_second(vf m2, vf m2n, vf m3, vf m3n, vf (&y)[kTile]) {
  const vf sum2 = vadd(m2, m2n), difference2 = vsub(m2, m2n), sum3 = vadd(m3, m3n), difference3 = vsub(m3, m3n);
  y[0] = vadd(y[0], vadd(sum2, sum3));
  y[1] = vfma(vset1(2.0f), difference2, vfma(vset1(0.5f), difference3, y[1]));
  y[2] = vfma(vset1(4.0f), sum2, vfma(vset1(0.25f), sum3, y[2]));
  y[3] = vfma(vset1(8.0f), difference2, vfma(vset1(0.125f), difference3, y[3]));
}

// Four activities from pixel x on, without those behind the row's end.
CL_INLINE void winograd_store(const WinogradArgs& w, int x, int v, const vf (&y)[kTile]) {
  float* out = w.out + v * w.out_vector_stride;
  const int inside = w.width - x;
#if defined(CORTEXLOOP_ISA_BF16)
  if (w.pairs) {
    out += x / 2 * kLanes;
    if (inside > 0) vstore(out, vpair(y[0], inside > 1 ? y[1] : vzero()));
    if (inside > 2) vstore(out + kLanes, vpair(y[2], inside > 3 ? y[3] : vzero()));
    return;
  }
#endif
  out += x * kLanes;
  if (inside >= kTile) {
    CL_UNROLL for (int i = 0; i < kTile; ++i) vstore(out + i * kLanes, y[i]);
  } else {
    for (int i = 0; i < inside; ++i) vstore(out + i * kLanes, y[i]);
  }
  if (w.mask == nullptr) return;
  std::uint16_t* mask = w.mask + v * w.mask_stride + x;
  CL_UNROLL for (int i = 0; i < kTile; ++i) {
    if (i < inside) mask[i] = vpositive(y[i]);
  }
}

// T tiles x N vectors of channels: 4 T output pixels.
template <int T, int N>
CL_NOINLINE void winograd_block(const WinogradArgs& args, int t, int v) {
  const WinogradArgs w = args;  // a copy whose fields no vector store can alias
  vf acc[4][T][N];
  alignas(64) float partial[T][N][4][kLanes];
  winograd_sum<T, N>(w, 0, t, v, acc);
  CL_UNROLL for (int k = 0; k < T; ++k) CL_UNROLL for (int n = 0; n < N; ++n) {
    vf y[kTile];
    winograd_output_first(acc[0][k][n], acc[1][k][n], acc[2][k][n], acc[3][k][n], y);
    CL_UNROLL for (int i = 0; i < kTile; ++i) vstore(partial[k][n][i], y[i]);
  }
  winograd_sum<T, N>(w, 1, t, v, acc);
  CL_UNROLL for (int n = 0; n < N; ++n) {
    const vf bias = vload(w.bias + (v + n) * kLanes);
    CL_UNROLL for (int k = 0; k < T; ++k) {
      vf y[kTile];
      CL_UNROLL for (int i = 0; i < kTile; ++i) y[i] = vload(partial[k][n][i]);
      winograd_output_second(acc[0][k][n], acc[1][k][n], acc[2][k][n], acc[3][k][n], y);
      CL_UNROLL for (int i = 0; i < kTile; ++i) y[i] = vrelu(vadd(y[i], bias));
      winograd_store(w, (t + k) * kTile, v + n, y);
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

// Gradient of the first layer by the same F(4, 5), with the kernel flipped along x. Lanes of the input transform are
// channels, lanes of the products are the 15 (kernel row, colour) pairs of a pixel.
constexpr int kRowColours = 16;  // 5 rows x 3 colours and a zero

struct WinogradGradientArgs {
  const float* d_z;  // [4 * tiles + 4, channels_p]: one row of d z_0, padded pixel 0 first (two zero pixels of margin)
  std::int32_t tiles, channels, channels_p;
  const float* weights;  // [8, channels, 16]
  float* transformed;    // scratch [8, tiles, channels_p]
  float* products;       // scratch [8, tiles, 16]
  float*
      out;  // [4 * tiles, 16]: for pixel x, what this row of d z_0 adds to image row y + 2 - i, colour c, at i * 3 + c
};

CL_NOINLINE void winograd_gradient_input(const WinogradGradientArgs& w) {
  const std::int64_t point_stride = static_cast<std::int64_t>(w.tiles) * w.channels_p;
  for (int t = 0; t < w.tiles; ++t) {
    for (int v = 0; v < w.channels_p; v += kLanes) {
      const float* in = w.d_z + static_cast<std::int64_t>(t) * kTile * w.channels_p + v;
      vf d[kPoints], transformed[kPoints];
      CL_UNROLL for (int q = 0; q < kPoints; ++q) d[q] = vload(in + q * w.channels_p);
      winograd_input(d, transformed);
      float* out = w.transformed + static_cast<std::int64_t>(t) * w.channels_p + v;
      CL_UNROLL for (int p = 0; p < kPoints; ++p) vstore(out + p * point_stride, transformed[p]);
    }
  }
}

CL_NOINLINE void winograd_gradient_output(const WinogradGradientArgs& w) {
  for (int t = 0; t < w.tiles; ++t) {
    for (int v = 0; v < kRowColours; v += kLanes) {
      const float* in = w.products + t * kRowColours + v;
      vf m[kPoints], y[kTile];
      CL_UNROLL for (int p = 0; p < kPoints; ++p) m[p] = vload(in + p * w.tiles * kRowColours);
      winograd_output_first(m[0], m[1], m[2], m[3], y);
      winograd_output_second(m[4], m[5], m[6], m[7], y);
      float* out = w.out + t * kTile * kRowColours + v;
      CL_UNROLL for (int i = 0; i < kTile; ++i) vstore(out + i * kRowColours, y[i]);
    }
  }
}

inline void winograd_gradient_row(const WinogradGradientArgs& w) {
  winograd_gradient_input(w);
  for (int p = 0; p < kPoints; ++p) {
    const float* a = w.transformed + static_cast<std::int64_t>(p) * w.tiles * w.channels_p;
    const float* b = w.weights + static_cast<std::int64_t>(p) * w.channels * kRowColours;
    GemmArgs g = plain_product(&a, w.channels_p, &b, kRowColours, w.channels, w.tiles);
    g.vectors = kRowColours / kLanes;
    g.out = w.products + static_cast<std::int64_t>(p) * w.tiles * kRowColours;
    g.out_vector_stride = kLanes;
    g.out_pixel_stride = kRowColours;
    gemm<ExactProduct>(g);
  }
  winograd_gradient_output(w);
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
