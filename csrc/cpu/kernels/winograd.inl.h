// First layer, 5 x 5, stride 1, by two-dimensional Winograd (Toom-Cook): F(4, 5) along rows, F(2, 5) across them.
//
//   a tile of 4 x 2 outputs  y = A'^T ( sum over 3 colours of (G' w G^T) * (B'^T x B) ) A,  x = 8 x 6 neighbouring pixels
//
// with the points 0, 1, -1, inf, 2, -2, 1/2, -1/2 along rows and 0, 1, -1, 2, -2, inf across: 48 products a colour where direct
// convolution needs 200. B along rows depends on no weights and is made once per image (`winograd_image_row`); B' across six
// rows is cheap enough to be made again for every model (`winograd_columns_input`), which keeps the shared part small; G' w G
// is packed with the bank. For one point along rows, all six points across x T tiles x N vectors of channels fit the
// registers; A' folds them to two rows, which wait in `partial` until all eight points are there for A.
// Rounding error about 1.6x that of the direct sum.
#pragma once

#include "../simd.h"
#include "gemm.inl.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kTile = 4;        // outputs per tile
constexpr int kPoints = 8;      // along rows
constexpr int kAcross = 6;      // points across rows, for two output rows
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

// B'^T of six neighbouring image rows, each [row_floats], element by element: `out` [6, row_floats].
CL_NOINLINE void winograd_columns_input(const float* CL_RESTRICT rows, std::int64_t row_floats,
                                        float* CL_RESTRICT out) {
  for (std::int64_t i = 0; i < row_floats; i += kLanes) {
    vf d[kAcross];
    CL_UNROLL for (int r = 0; r < kAcross; ++r) d[r] = vload(rows + r * row_floats + i);
    const vf four = vset1(4.0f), five = vset1(-5.0f), minus_four = vset1(-4.0f), two = vset1(2.0f);
    const vf even1 = vfma(minus_four, d[2], d[4]), odd1 = vfma(minus_four, d[1], d[3]);
    const vf even2 = vsub(d[4], d[2]), odd2 = vsub(d[3], d[1]);
    vstore(out + i, vfma(four, d[0], vfma(five, d[2], d[4])));
    vstore(out + row_floats + i, vadd(even1, odd1));
    vstore(out + 2 * row_floats + i, vsub(even1, odd1));
    vstore(out + 3 * row_floats + i, vfma(two, odd2, even2));
    vstore(out + 4 * row_floats + i, vfma(vset1(-2.0f), odd2, even2));
    vstore(out + 5 * row_floats + i, vfma(four, d[1], vfma(five, d[3], d[5])));
  }
}

struct WinogradArgs {
  const float* image;  // [6, 3, 8, tiles_p]: six rows of pixels in the transformed domain
  std::int32_t tiles_p;
  const float* weights;  // [8, 6, 3, channels_p]
  std::int64_t channels_p;
  const float* bias;  // [channels_p]
  std::int32_t width, vectors;
  std::int32_t rows;  // 1 or 2: the second row of the last pair may lie outside
  float* out[2];      // vector v of pixel x at out[row] + v * out_vector_stride + x * kLanes
  std::int64_t out_vector_stride;
  bool pairs;              // fast mode: two neighbouring pixels in bfloat16 to a slot, pair x at x * kLanes; no mask
  std::uint16_t* mask[2];  // [vectors, mask_stride] or null
  std::int64_t mask_stride;
};

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

// Four activities of one row from pixel x on, without those behind the row's end.
CL_INLINE void winograd_store(const WinogradArgs& w, int row, int x, int v, const vf (&y)[kTile]) {
  float* out = w.out[row] + v * w.out_vector_stride;
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
  if (w.mask[row] == nullptr) return;
  std::uint16_t* mask = w.mask[row] + v * w.mask_stride + x;
  CL_UNROLL for (int i = 0; i < kTile; ++i) {
    if (i < inside) mask[i] = vpositive(y[i]);
  }
}

// T tiles x N vectors of channels: 4 T pixels of two output rows.
template <int T, int N>
CL_NOINLINE void winograd_block(const WinogradArgs& args, int t, int v) {
  const WinogradArgs w = args;  // a copy whose fields no vector store can alias
  alignas(64) float partial[2][T][N][kPoints][kLanes];
  const std::int64_t image_stride = static_cast<std::int64_t>(kPoints) * w.tiles_p;
  const float* weights = w.weights + v * kLanes;
  for (int p = 0; p < kPoints; ++p) {
    const float* image = w.image + static_cast<std::int64_t>(p) * w.tiles_p + t;
    vf m[kAcross][T][N];
    CL_UNROLL for (int q = 0; q < kAcross; ++q) {
      CL_UNROLL for (int c = 0; c < 3; ++c) {
        vf u[N];
        CL_UNROLL for (int n = 0; n < N; ++n) {
          u[n] = vload(weights + n * kLanes);
          if (T > 1) vkeep(u[n]);
        }
        CL_UNROLL for (int k = 0; k < T; ++k) {
          const vf value = vset1(image[k]);
          CL_UNROLL for (int n = 0; n < N; ++n) m[q][k][n] = c == 0 ? vmul(value, u[n]) : vfma(value, u[n], m[q][k][n]);
        }
        weights += w.channels_p;
        opaque(weights);
        image += image_stride;
        opaque(image);
      }
    }
    CL_UNROLL for (int k = 0; k < T; ++k) CL_UNROLL for (int n = 0; n < N; ++n) {
      const vf sum1 = vadd(m[1][k][n], m[2][k][n]), difference1 = vsub(m[1][k][n], m[2][k][n]);
      const vf sum2 = vadd(m[3][k][n], m[4][k][n]), difference2 = vsub(m[3][k][n], m[4][k][n]);
      vstore(partial[0][k][n][p], vadd(m[0][k][n], vadd(sum1, sum2)));
      vstore(partial[1][k][n][p], vfma(vset1(2.0f), difference2, vadd(difference1, m[5][k][n])));
    }
  }
  for (int row = 0; row < w.rows; ++row) {
    CL_UNROLL for (int n = 0; n < N; ++n) {
      const vf bias = vload(w.bias + (v + n) * kLanes);
      CL_UNROLL for (int k = 0; k < T; ++k) {
        vf m[kPoints], y[kTile];
        CL_UNROLL for (int p = 0; p < kPoints; ++p) m[p] = vload(partial[row][k][n][p]);
        winograd_output_first(m[0], m[1], m[2], m[3], y);
        winograd_output_second(m[4], m[5], m[6], m[7], y);
        CL_UNROLL for (int i = 0; i < kTile; ++i) y[i] = vrelu(vadd(y[i], bias));
        winograd_store(w, row, (t + k) * kTile, v + n, y);
      }
    }
  }
}

template <int T, int N>
void winograd_columns(const WinogradArgs& w, int v) {
  for (int t = 0; t * kTile < w.width; t += T) winograd_block<T, N>(w, t, v);
}

// Two output rows. No block passes the padded tiles: kTileAlign is a multiple of every T.
inline void winograd_rows(const WinogradArgs& w) {
  constexpr bool kMany = kRegisters >= 32;
  int v = 0;
  for (; v + 2 <= w.vectors; v += 2) winograd_columns<kMany ? 2 : 1, 2>(w, v);
  if (v < w.vectors) winograd_columns<kMany ? 4 : 2, 1>(w, v);
}

// Gradient of the first layer by F(4, 5) along rows alone, with the kernel flipped along x. Lanes of the input transform are
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
