// Non-negative factorization of one matrix, from its start to its end (see cortexloop/nmf.h).
//
// Work:   one task = one problem; nothing is shared between tasks, and no task leaves its core.
// Memory: one pass over M per iteration. Four rows (or two) at a time, products with H give the rows' entries of W; their share of
//         W X is added while the rows are still in the first-level cache. A matrix of 144 x 1024 (590 KB) stays in the second level.
// Order:  rows and columns one after the other; lanes of a row's products are summed at its end.
#pragma once

#include <cstring>

#include "../kernel_table.h"
#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kNmfRows = kRegisters == 32 ? 4 : 2;  // rows that share loads of H
constexpr int kNmfFactors = 4;                      // factors whose sums or weights are in registers together

CL_INLINE std::int64_t nmf_padded(std::int64_t columns) { return (columns + 15) / 16 * 16; }

std::int64_t nmf_scratch_floats(const NmfArgs& a) {
  const std::int64_t width = (a.is_signed ? 2 : 1) * nmf_padded(a.columns);
  return a.rows * nmf_padded(a.columns) + 2 * a.rank * width + 2 * a.rank * a.rank + kNmfRows * a.rank;
}

CL_INLINE float lane_sum(vf x) {
  float lanes[kLanes];
  vstore(lanes, x);
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// products[row * rank + r] = sum_c X[row, c] H[r, c], of kRows rows and kFactors factors.
template <int kRows, int kFactors, bool kSigned>
CL_INLINE void nmf_products(const float* x, std::int64_t padded, const float* h, std::int64_t rank, float* products) {
  const std::int64_t width = kSigned ? 2 * padded : padded;
  vf sum[kRows][kFactors];
  for (int i = 0; i < kRows; ++i) {
    for (int r = 0; r < kFactors; ++r) sum[i][r] = vzero();
  }
  for (std::int64_t c = 0; c < padded; c += kLanes) {
    vf plus[kRows], minus[kRows];
    for (int i = 0; i < kRows; ++i) {
      const vf value = vload(x + i * padded + c);
      plus[i] = kSigned ? vrelu(value) : value;
      minus[i] = kSigned ? vsub(plus[i], value) : value;
    }
    for (int r = 0; r < kFactors; ++r) {
      const vf hp = vload(h + r * width + c);
      for (int i = 0; i < kRows; ++i) sum[i][r] = vfma(plus[i], hp, sum[i][r]);
      if (kSigned) {
        const vf hm = vload(h + r * width + padded + c);
        for (int i = 0; i < kRows; ++i) sum[i][r] = vfma(minus[i], hm, sum[i][r]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int r = 0; r < kFactors; ++r) products[i * rank + r] = lane_sum(sum[i][r]);
  }
}

// wx[r, c] += sum_i W[r, row i] X[row i, c], of kFactors factors.
template <int kRows, int kFactors, bool kSigned>
CL_INLINE void nmf_accumulate(const float* x, std::int64_t padded, const float* w, std::int64_t rows, float* wx) {
  const std::int64_t width = kSigned ? 2 * padded : padded;
  vf weight[kRows][kFactors];
  for (int i = 0; i < kRows; ++i) {
    for (int r = 0; r < kFactors; ++r) weight[i][r] = vset1(w[r * rows + i]);
  }
  for (std::int64_t c = 0; c < padded; c += kLanes) {
    vf plus[kRows], minus[kRows];
    for (int i = 0; i < kRows; ++i) {
      const vf value = vload(x + i * padded + c);
      plus[i] = kSigned ? vrelu(value) : value;
      minus[i] = kSigned ? vsub(plus[i], value) : value;
    }
    for (int r = 0; r < kFactors; ++r) {
      float* out = wx + r * width + c;
      vf total = vload(out);
      for (int i = 0; i < kRows; ++i) total = vfma(plus[i], weight[i][r], total);
      vstore(out, total);
      if (kSigned) {
        vf other = vload(out + padded);
        for (int i = 0; i < kRows; ++i) other = vfma(minus[i], weight[i][r], other);
        vstore(out + padded, other);
      }
    }
  }
}

// One row's entries of W by coordinate descent; returns their |projected gradients|.
CL_INLINE float nmf_row(const float* gram, const float* products, std::int64_t rank, float l1, std::int64_t rows,
                        float* w) {
  float violation = 0.0f;
  for (std::int64_t t = 0; t < rank; ++t) {
    float gradient = l1 - products[t];
    for (std::int64_t r = 0; r < rank; ++r) gradient += gram[t * rank + r] * w[r * rows];
    const float value = w[t * rows];
    violation += gradient < 0.0f ? -gradient : (value > 0.0f ? gradient : 0.0f);
    const float curvature = gram[t * rank + t];
    const float moved = curvature > 0.0f ? value - gradient / curvature : value;
    w[t * rows] = moved > 0.0f ? moved : 0.0f;
  }
  return violation;
}

template <int kRows, bool kSigned>
CL_NOINLINE float nmf_rows(const float* x, std::int64_t padded, const float* h, const float* gram, std::int64_t rows,
                           std::int64_t rank, float l1, float* w, float* products, float* wx) {
  const std::int64_t width = kSigned ? 2 * padded : padded;
  const std::int64_t whole = rank / kNmfFactors * kNmfFactors, rest = rank - whole;
  for (std::int64_t r = 0; r < whole; r += kNmfFactors) {
    nmf_products<kRows, kNmfFactors, kSigned>(x, padded, h + r * width, rank, products + r);
  }
  const float* h_rest = h + whole * width;
  if (rest == 3) nmf_products<kRows, 3, kSigned>(x, padded, h_rest, rank, products + whole);
  if (rest == 2) nmf_products<kRows, 2, kSigned>(x, padded, h_rest, rank, products + whole);
  if (rest == 1) nmf_products<kRows, 1, kSigned>(x, padded, h_rest, rank, products + whole);
  float violation = 0.0f;
  for (int i = 0; i < kRows; ++i) violation += nmf_row(gram, products + i * rank, rank, l1, rows, w + i);
  for (std::int64_t r = 0; r < whole; r += kNmfFactors) {
    nmf_accumulate<kRows, kNmfFactors, kSigned>(x, padded, w + r * rows, rows, wx + r * width);
  }
  const float* w_rest = w + whole * rows;
  float* wx_rest = wx + whole * width;
  if (rest == 3) nmf_accumulate<kRows, 3, kSigned>(x, padded, w_rest, rows, wx_rest);
  if (rest == 2) nmf_accumulate<kRows, 2, kSigned>(x, padded, w_rest, rows, wx_rest);
  if (rest == 1) nmf_accumulate<kRows, 1, kSigned>(x, padded, w_rest, rows, wx_rest);
  return violation;
}

// H by coordinate descent, given W W' and W X; returns the sum of |projected gradients|.
CL_INLINE float nmf_columns(const float* gram, const float* wx, std::int64_t rank, std::int64_t width, float l1,
                            float* h) {
  vf violation = vzero();
  for (std::int64_t c = 0; c < width; c += kLanes) {
    for (std::int64_t t = 0; t < rank; ++t) {
      vf gradient = vsub(vset1(l1), vload(wx + t * width + c));
      for (std::int64_t r = 0; r < rank; ++r) {
        gradient = vfma(vset1(gram[t * rank + r]), vload(h + r * width + c), gradient);
      }
      const vf value = vload(h + t * width + c);
      const vf rising = vrelu(gradient), falling = vrelu(vsub(vzero(), gradient));
      violation = vadd(violation, vadd(falling, vwhere(vpositive(value), rising)));
      const float curvature = gram[t * rank + t];
      if (curvature > 0.0f) vstore(h + t * width + c, vrelu(vfma(vset1(-1.0f / curvature), gradient, value)));
    }
  }
  return lane_sum(violation);
}

// gram = A A' + l2 I of the rows of A [rank, count], stride `width`.
CL_INLINE void nmf_gram(const float* a, std::int64_t rank, std::int64_t width, std::int64_t count, float l2,
                        float* gram) {
  for (std::int64_t s = 0; s < rank; ++s) {
    for (std::int64_t t = 0; t <= s; ++t) {
      vf lanes = vzero();
      std::int64_t c = 0;
      for (; c + kLanes <= count; c += kLanes) lanes = vfma(vload(a + s * width + c), vload(a + t * width + c), lanes);
      float sum = lane_sum(lanes);
      for (; c < count; ++c) sum += a[s * width + c] * a[t * width + c];
      gram[s * rank + t] = gram[t * rank + s] = sum;
    }
    gram[s * rank + s] += l2;
  }
}

template <bool kSigned>
void nmf_solve(const NmfArgs& a, std::int64_t problem, float* scratch) {
  const std::int64_t padded = nmf_padded(a.columns), parts = kSigned ? 2 : 1, width = parts * padded;
  float* x = scratch;  // [rows, padded]
  float* h = x + a.rows * padded;
  float* wx = h + a.rank * width;
  float* gram_h = wx + a.rank * width;
  float* gram_w = gram_h + a.rank * a.rank;
  float* products = gram_w + a.rank * a.rank;
  float* w = a.w + problem * a.rank * a.rows;
  float* result = a.h + problem * a.rank * parts * a.columns;
  const std::size_t row_bytes = static_cast<std::size_t>(a.columns) * sizeof(float);
  const std::size_t rest_bytes = static_cast<std::size_t>(padded - a.columns) * sizeof(float);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    std::memcpy(x + i * padded, a.matrices + (problem * a.rows + i) * a.columns, row_bytes);
    std::memset(x + i * padded + a.columns, 0, rest_bytes);
  }
  for (std::int64_t k = 0; k < a.rank * parts; ++k) {
    std::memcpy(h + k * padded, result + k * a.columns, row_bytes);
    std::memset(h + k * padded + a.columns, 0, rest_bytes);
  }
  double first = 0.0;
  std::int64_t done = 0;
  while (done < a.max_iterations) {
    nmf_gram(h, a.rank, width, width, a.l2_w, gram_h);
    std::memset(wx, 0, static_cast<std::size_t>(a.rank * width) * sizeof(float));
    double violation = 0.0;
    std::int64_t i = 0;
    for (; i + kNmfRows <= a.rows; i += kNmfRows) {
      violation += static_cast<double>(
          nmf_rows<kNmfRows, kSigned>(x + i * padded, padded, h, gram_h, a.rows, a.rank, a.l1_w, w + i, products, wx));
    }
    for (; i < a.rows; ++i) {
      violation += static_cast<double>(
          nmf_rows<1, kSigned>(x + i * padded, padded, h, gram_h, a.rows, a.rank, a.l1_w, w + i, products, wx));
    }
    nmf_gram(w, a.rank, a.rows, a.rows, a.l2_h, gram_w);
    violation += static_cast<double>(nmf_columns(gram_w, wx, a.rank, width, a.l1_h, h));
    if (done == 0) first = violation;
    ++done;
    if (!(violation > static_cast<double>(a.tolerance) * first)) break;
  }
  for (std::int64_t k = 0; k < a.rank * parts; ++k) { std::memcpy(result + k * a.columns, h + k * padded, row_bytes); }
  a.iterations[problem] = done;
}

void nmf_problem(const NmfArgs& a, std::int64_t problem, float* scratch) {
  if (a.is_signed) {
    nmf_solve<true>(a, problem, scratch);
  } else {
    nmf_solve<false>(a, problem, scratch);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
