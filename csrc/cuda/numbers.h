// Pairs of neighbouring channels, in the two precisions of a map between fused layers, and small device functions.
#pragma once

#include "images.h"
#include "packed.h"

namespace cortexloop::cuda {

__device__ __forceinline__ std::uint32_t bits(__half2 x) { return *reinterpret_cast<const std::uint32_t*>(&x); }

// The power of two by which numbers up to `largest` become numbers below 2^kHalfBound. 1 for 0, infinity and NaN.
__device__ __forceinline__ float scale_for(float largest) {
  const int exponent = static_cast<int>((__float_as_uint(largest) >> 23) & 0xff) - 127;  // largest < 2^(exponent + 1)
  if (exponent == -127 || exponent == 128) return 1.0f;
  const int shift = max(-126, min(126, kHalfBound - 1 - exponent));
  return __uint_as_float(static_cast<std::uint32_t>(shift + 127) << 23);
}

// How a kernel keeps numbers between fused layers, and the shape of its blocks, which follows from the registers that
// takes. kRows rows of the first map are taken at a time. kParked: the sums of the third map's layer wait in shared memory
// while other layers work, where registers are too few even so. kColumns is the number of output columns of one thread in a depthwise layer of the head, whose sums stay in
// registers; 8 groups of 7 columns by 32 pairs of channels, or 14 of 4, cover the rows of a published model.

// Maps and depthwise sums in halves, one half per operand.
struct Fast {
  using Pair = __half2;
  static constexpr bool kExact = false, kParked = true;
  static constexpr int kPlanes = 1;
  static constexpr int kThreads = 256, kBlocks = 2, kColumns = 7, kRows = 4;
};

// Maps and depthwise sums in float32, two halves per operand.
struct Exact {
  using Pair = float2;
  static constexpr bool kExact = true, kParked = false;
  static constexpr int kPlanes = 2;
  static constexpr int kThreads = 512, kBlocks = 1, kColumns = 4, kRows = 2;
};

constexpr int kPlainThreads = 256;
constexpr int kMaxWarps = 16;

__device__ __forceinline__ void set_zero(__half2& x) { x = __float2half2_rn(0.0f); }
__device__ __forceinline__ void set_zero(float2& x) { x = make_float2(0.0f, 0.0f); }

__device__ __forceinline__ void fused_add(__half2& sum, __half2 a, __half2 b) { sum = __hfma2(a, b, sum); }
__device__ __forceinline__ void fused_add(float2& sum, float2 a, float2 b) {
  sum.x = fmaf(a.x, b.x, sum.x);
  sum.y = fmaf(a.y, b.y, sum.y);
}

// A pair of channels through the ReLU.
__device__ __forceinline__ void store_relu(__half2* to, float x, float y) { *to = relu_to_halves(x, y); }
__device__ __forceinline__ void store_relu(float2* to, float x, float y) { *to = make_float2(relu(x), relu(y)); }

// A pair as operands of a matrix product: plane 0 and, for float2, what its halves leave over in plane 1.
__device__ __forceinline__ void store_operand(__half* to, int, __half2 x) { *reinterpret_cast<__half2*>(to) = x; }
__device__ __forceinline__ void store_operand(__half* to, int plane, float2 x) {
  const __half2 high = __floats2half2_rn(x.x, x.y);
  const float2 rounded = __half22float2(high);
  *reinterpret_cast<__half2*>(to) = high;
  *reinterpret_cast<__half2*>(to + plane) = __floats2half2_rn(x.x - rounded.x, x.y - rounded.y);
}

}  // namespace cortexloop::cuda
