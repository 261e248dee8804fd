// Rows of random numbers, and the arithmetic of one row of codes.
//
// Only exactly rounded operations in one written order (see cortexloop/evolution.h): vadd, vmul and square roots, never vfma, so
// that every instruction set gives the same bits. The integer and the Box-Muller loops are plain C over 64 or 16 lanes, which
// compilers turn into vectors of any width without changing a bit.
#pragma once

#include <cmath>
#include <cstring>

#include "../kernel_table.h"
#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kRandomLanes = 16;                // blocks of Philox side by side
constexpr int kRandomGroup = 4 * kRandomLanes;  // columns they give: four words each
static_assert(kRandomGroup == kPartialSums, "buffers below serve both");

CL_INLINE float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

CL_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Ten rounds for 16 consecutive blocks: words[k * 16 + l] is word k of block first + l.
CL_INLINE void philox(const RandomRow& row, std::uint32_t first, std::uint32_t* CL_RESTRICT words) {
  std::uint32_t c0[kRandomLanes], c1[kRandomLanes], c2[kRandomLanes], c3[kRandomLanes];
  for (int l = 0; l < kRandomLanes; ++l) {
    c0[l] = first + static_cast<std::uint32_t>(l);
    c1[l] = row.row;
    c2[l] = row.step;
    c3[l] = row.problem;
  }
  std::uint32_t key0 = row.key0, key1 = row.key1;
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kRandomLanes; ++l) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0[l];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2[l];
      c0[l] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[l] ^ key0;
      c1[l] = static_cast<std::uint32_t>(p1);
      c2[l] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[l] ^ key1;
      c3[l] = static_cast<std::uint32_t>(p0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  std::memcpy(words, c0, sizeof c0);
  std::memcpy(words + kRandomLanes, c1, sizeof c1);
  std::memcpy(words + 2 * kRandomLanes, c2, sizeof c2);
  std::memcpy(words + 3 * kRandomLanes, c3, sizeof c3);
}

constexpr float kUnit = 1.0f / 16777216.0f;  // 2^-24

// -2 ln((w >> 8) + 1) / 2^24), at least 0. ln(1 + f) = f - f^2 / 2 + f^3 P(f), P least squares at Chebyshev nodes, error 3e-8.
CL_INLINE float minus_two_log(std::uint32_t word) {
  const float u = static_cast<float>(static_cast<std::int32_t>((word >> 8) + 1)) * kUnit;
  const auto bits = static_cast<std::int32_t>(bits_of(u));
  const std::int32_t exponent = (bits - 0x3f3504f3) >> 23;  // the mantissa goes to [sqrt(1/2), sqrt(2))
  const float f = float_of(static_cast<std::uint32_t>(bits - exponent * 0x800000)) - 1.0f;
  float p = 0.0714975372f;
  p = p * f + -0.115712009f;
  p = p * f + 0.116615109f;
  p = p * f + -0.124110505f;
  p = p * f + 0.142499372f;
  p = p * f + -0.166684806f;
  p = p * f + 0.200007081f;
  p = p * f + -0.249999896f;
  p = p * f + 0.333333313f;
  const float square = f * f;
  const float log_mantissa = (p * f * square - square * 0.5f) + f;
  const float log = log_mantissa + static_cast<float>(exponent) * 0.693147182f;
  return log * -2.0f;
}

// Box-Muller: two words to two normal numbers. The angle is quadrant * pi/2 + g pi/2 with g in [-1/2, 1/2).
CL_INLINE void box_muller(const std::uint32_t* CL_RESTRICT radius_words, const std::uint32_t* CL_RESTRICT angle_words,
                          float* CL_RESTRICT cosines, float* CL_RESTRICT sines) {
  for (int l = 0; l < kRandomLanes; ++l) {
    const float r = sqrtf(minus_two_log(radius_words[l]));
    const std::uint32_t t = angle_words[l] >> 8;
    const auto offset = static_cast<std::int32_t>(t & 0x3fffffu) - 0x200000;
    const float x = static_cast<float>(offset) * (1.57079637f / 4194304.0f);
    const float y = x * x;
    const float sine = ((y * -0.000195879504f + 0.0083327489f) * y + -0.166666642f) * y * x + x;
    const float cosine = ((y * 2.45476131e-05f + -0.00138883002f) * y + 0.0416666642f) * y * y - y * 0.5f + 1.0f;
    const std::uint32_t quadrant = t >> 22;
    const std::uint32_t swap = 0u - (quadrant & 1u);  // all ones in the odd quadrants
    const std::uint32_t s = bits_of(sine * r), c = bits_of(cosine * r);
    const std::uint32_t along = (s & swap) | (c & ~swap), across = (c & swap) | (s & ~swap);
    cosines[l] = float_of(along ^ (((quadrant + 1u) & 2u) << 30));
    sines[l] = float_of(across ^ ((quadrant & 2u) << 30));
  }
}

CL_INLINE void uniform_group(const RandomRow& row, std::uint32_t first, float* CL_RESTRICT out) {
  std::uint32_t words[kRandomGroup];
  philox(row, first, words);
  for (int i = 0; i < kRandomGroup; ++i) out[i] = static_cast<float>(static_cast<std::int32_t>(words[i] >> 8)) * kUnit;
}

CL_INLINE void normal_group(const RandomRow& row, std::uint32_t first, float* CL_RESTRICT out) {
  std::uint32_t words[kRandomGroup];
  philox(row, first, words);
  for (int k = 0; k < 4; k += 2) {
    box_muller(words + k * kRandomLanes, words + (k + 1) * kRandomLanes, out + k * kRandomLanes,
               out + (k + 1) * kRandomLanes);
  }
}

void random_row(const RandomRow& row, bool normal, std::int64_t columns, float* out) {
  std::uint32_t block = 0;
  std::int64_t c = 0;
  for (; c + kRandomGroup <= columns; c += kRandomGroup, block += kRandomLanes) {
    normal ? normal_group(row, block, out + c) : uniform_group(row, block, out + c);
  }
  if (c < columns) {
    float rest[kRandomGroup];
    normal ? normal_group(row, block, rest) : uniform_group(row, block, rest);
    std::memcpy(out + c, rest, static_cast<std::size_t>(columns - c) * sizeof(float));
  }
}

constexpr int kSumVectors = kPartialSums / kLanes;

CL_INLINE void add_products(vf* sums, const float* a, const float* b) {
  CL_UNROLL
  for (int i = 0; i < kSumVectors; ++i) { sums[i] = vadd(sums[i], vmul(vload(a + i * kLanes), vload(b + i * kLanes))); }
}

CL_NOINLINE float dot(const float* a, const float* b, std::int64_t columns) {
  vf sums[kSumVectors];
  CL_UNROLL
  for (int i = 0; i < kSumVectors; ++i) sums[i] = vzero();
  std::int64_t c = 0;
  for (; c + kPartialSums <= columns; c += kPartialSums) add_products(sums, a + c, b + c);
  if (c < columns) {
    float rest_a[kPartialSums] = {}, rest_b[kPartialSums] = {};
    std::memcpy(rest_a, a + c, static_cast<std::size_t>(columns - c) * sizeof(float));
    std::memcpy(rest_b, b + c, static_cast<std::size_t>(columns - c) * sizeof(float));
    add_products(sums, rest_a, rest_b);
  }
  float partial[kPartialSums];
  CL_UNROLL
  for (int i = 0; i < kSumVectors; ++i) vstore(partial + i * kLanes, sums[i]);
  for (int half = kPartialSums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
  }
  return partial[0];
}

// x (I + left^T right) in place; `dots` holds `rank` numbers. All products with the old x come first.
void low_rank_row(const float* left, const float* right, std::int64_t rank, std::int64_t columns, float* dots,
                  float* x) {
  for (std::int64_t k = 0; k < rank; ++k) dots[k] = dot(x, left + k * columns, columns);
  for (std::int64_t k = 0; k < rank; ++k) {
    const float* CL_RESTRICT add = right + k * columns;
    const float weight = dots[k];
    for (std::int64_t c = 0; c < columns; ++c) x[c] = x[c] + weight * add[c];
  }
}

// out = mean + scale * (diagonal o z (I + left^T right)); factors of one problem.
void sample_row(const RandomRow& row, const float* mean, float scale, const float* diagonal, const LowRank& factors,
                std::int64_t columns, float* dots, float* out) {
  random_row(row, true, columns, out);
  if (factors.rank > 0) low_rank_row(factors.left, factors.right, factors.rank, columns, dots, out);
  if (diagonal != nullptr) {
    for (std::int64_t c = 0; c < columns; ++c) out[c] = mean[c] + scale * (diagonal[c] * out[c]);
  } else {
    for (std::int64_t c = 0; c < columns; ++c) out[c] = mean[c] + scale * out[c];
  }
}

// Columns [0, count) of the weighted sums over rows; pointers are at the first of these columns, rows `columns` apart.
void moments_block(const float* codes, const float* weights, const float* centre, std::int64_t rows,
                   std::int64_t columns, std::int64_t count, float* first, float* second) {
  std::memset(first, 0, static_cast<std::size_t>(count) * sizeof(float));
  if (second != nullptr) std::memset(second, 0, static_cast<std::size_t>(count) * sizeof(float));
  for (std::int64_t r = 0; r < rows; ++r) {
    const float weight = weights[r];
    if (weight == 0.0f) continue;
    const float* CL_RESTRICT code = codes + r * columns;
    for (std::int64_t c = 0; c < count; ++c) first[c] = first[c] + weight * code[c];
    if (second == nullptr) continue;
    for (std::int64_t c = 0; c < count; ++c) {
      const float deviation = code[c] - centre[c];
      second[c] = second[c] + weight * (deviation * deviation);
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
