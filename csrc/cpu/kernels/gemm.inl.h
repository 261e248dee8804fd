// Row-times-matrix products: the pointwise convolutions, the direct first layer and their transposes.
//
//   out[x][o] = epilogue( sum_s sum_d a_s[x * lda + d] * b_s[d * ldb + o] ),   x < width, o < vectors * kLanes
//
// `a` is read one float at a time (broadcast), `b` and `out` in vectors of neighbouring output channels.
// Blocks of P pixels x N vectors stay in registers: P * N accumulators, N vectors of b and one broadcast.
// Order of summation: segments, then d; the same for every block size, so a pixel's bits do not depend on its block.
#pragma once

#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

// The product at the heart: exact, or in the fast mode two bfloat16 channels at a time, packed into each float slot of `a`
// and `b` (then `lda` and `depth` count slots).
struct ExactProduct {
  static CL_INLINE vf add(vf a, vf b, vf c) { return vfma(a, b, c); }
};
#if defined(CORTEXLOOP_ISA_BF16)
struct PairProduct {
  static CL_INLINE vf add(vf a, vf b, vf c) { return vdot_pairs(a, b, c); }
};
#endif

struct GemmArgs {
  const float* const* a;  // [segments], each [width, lda]
  const float* const* b;  // [segments], each [depth, ldb]
  std::int32_t segments, depth;
  std::int64_t lda, ldb;
  std::int32_t width, vectors;
  float* out;  // vector v of pixel x at out + v * out_vector_stride + x * out_pixel_stride
  std::int64_t out_vector_stride, out_pixel_stride;
  const float* bias;    // [vectors * kLanes]: adds it and applies ReLU; null: plain product
  std::uint16_t* mask;  // [vectors, mask_stride]: bits of positive outputs; null: not wanted
  std::int64_t mask_stride;
};

// A plain product of one segment; the caller adds bias and mask, or more segments, where it wants them.
inline GemmArgs plain_product(const float* const* a, std::int64_t lda, const float* const* b, std::int64_t ldb,
                              std::int32_t depth, std::int32_t width) {
  GemmArgs g = {};
  g.a = a;
  g.lda = lda;
  g.b = b;
  g.ldb = ldb;
  g.segments = 1;
  g.depth = depth;
  g.width = width;
  return g;
}

template <class Product, int P, int N>
CL_INLINE void gemm_block(const GemmArgs& g, int x, int v) {
  vf acc[P][N];
  CL_UNROLL for (int p = 0; p < P; ++p) CL_UNROLL for (int n = 0; n < N; ++n) acc[p][n] = vzero();
  for (int s = 0; s < g.segments; ++s) {
    const float* CL_RESTRICT a = g.a[s] + x * g.lda;
    const float* CL_RESTRICT b = g.b[s] + v * kLanes;
    const std::int64_t lda = g.lda, ldb = g.ldb;
    for (int d = 0; d < g.depth; ++d) {
      vf row[N];
      CL_UNROLL for (int n = 0; n < N; ++n) {
        row[n] = vload(b + n * kLanes);
        if (P > 1) vkeep(row[n]);
      }
      CL_UNROLL for (int p = 0; p < P; ++p) {
        const vf value = vset1(a[p * lda]);
        CL_UNROLL for (int n = 0; n < N; ++n) acc[p][n] = Product::add(value, row[n], acc[p][n]);
      }
      ++a;
      b += ldb;
    }
  }
  CL_UNROLL for (int n = 0; n < N; ++n) {
    float* out = g.out + (v + n) * g.out_vector_stride + x * g.out_pixel_stride;
    if (g.bias != nullptr) {
      const vf bias = vload(g.bias + (v + n) * kLanes);
      CL_UNROLL for (int p = 0; p < P; ++p) acc[p][n] = vrelu(vadd(acc[p][n], bias));
    }
    if (g.mask != nullptr) {
      std::uint16_t* mask = g.mask + (v + n) * g.mask_stride + x;
      CL_UNROLL for (int p = 0; p < P; ++p) mask[p] = vpositive(acc[p][n]);
    }
    CL_UNROLL for (int p = 0; p < P; ++p) vstore(out + p * g.out_pixel_stride, acc[p][n]);
  }
}

// All pixels for N vectors: blocks of P, a block of half that, then one block that overlaps its left neighbour.
template <class Product, int P, int N>
CL_NOINLINE void gemm_columns(const GemmArgs& args, int v) {
  const GemmArgs g = args;  // a copy whose fields no vector store can alias
  constexpr int kHalf = P / 2;
  int x = 0;
  for (; x + P <= g.width; x += P) gemm_block<Product, P, N>(g, x, v);
  if (x < g.width && g.width >= P && g.width - x > kHalf) {
    gemm_block<Product, P, N>(g, g.width - P, v);
    return;
  }
  if (x < g.width && g.width >= kHalf) {
    if (x + kHalf <= g.width) {
      gemm_block<Product, kHalf, N>(g, x, v);
      x += kHalf;
    }
    if (x < g.width) gemm_block<Product, kHalf, N>(g, g.width - kHalf, v);
    return;
  }
  for (; x < g.width; ++x) gemm_block<Product, 1, N>(g, x, v);
}

// Block shapes by register count: 32 registers hold up to 28 accumulators, 16 hold 12.
template <class Product>
void gemm(const GemmArgs& g) {
  constexpr bool kMany = kRegisters >= 32;
  int v = 0;
  while (v < g.vectors) {
    const int left = g.vectors - v;
    if (kMany && left == 5) {
      gemm_columns<Product, 5, 5>(g, v);
      v += 5;
    } else if (kMany && left == 4) {
      gemm_columns<Product, 6, 4>(g, v);
      v += 4;
    } else if (left >= 3 && left != 4) {
      gemm_columns<Product, kMany ? 8 : 4, 3>(g, v);
      v += 3;
    } else if (left >= 2) {
      gemm_columns<Product, kMany ? 14 : 6, 2>(g, v);
      v += 2;
    } else {
      gemm_columns<Product, kMany ? 14 : 8, 1>(g, v);
      v += 1;
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
