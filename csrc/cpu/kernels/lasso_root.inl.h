// What the coordinate descent in lasso.inl.h is made of: sums of rows, the state of a path, and the triangular root of
// the products of the features in use, which follows them as they come and go.
//
// Rows start at multiples of 64 bytes. All loops are plain C that compilers turn into vectors without changing a bit.
#pragma once

#include <cmath>
#include <cstring>

#include "../kernel_table.h"
#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kDotLanes = 32;        // partial sums of a dot product; added up by halves
constexpr int kLine = 8;             // doubles in 64 bytes; rows that are solved together
constexpr int kBlock = 8;            // members that become active at a time
constexpr double kDependent = 1e-9;  // share of a feature's sum of squares that other active ones leave unexplained

CL_NOINLINE double dot_f64(const double* CL_RESTRICT a, const double* CL_RESTRICT b, std::int64_t n) {
  double partial[kDotLanes] = {};
  std::int64_t i = 0;
  for (; i + kDotLanes <= n; i += kDotLanes) {
    for (int l = 0; l < kDotLanes; ++l) partial[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) partial[l] += a[i] * b[i];
  for (int half = kDotLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
  }
  return partial[0];
}

// y -= scale * x
CL_NOINLINE void subtract_scaled(double scale, const double* CL_RESTRICT x, std::int64_t n, double* CL_RESTRICT y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] -= scale * x[i];
}

// y -= sum of kLine rows x[k] * scale[k]: so many streams that their latency is hidden where rows come from far
CL_NOINLINE void subtract_rows(const double* CL_RESTRICT scale, const double* const* x, std::int64_t n,
                               double* CL_RESTRICT y) {
  static_assert(kLine == 8, "written out below");
  const double *CL_RESTRICT x0 = x[0], *CL_RESTRICT x1 = x[1], *CL_RESTRICT x2 = x[2], *CL_RESTRICT x3 = x[3];
  const double *CL_RESTRICT x4 = x[4], *CL_RESTRICT x5 = x[5], *CL_RESTRICT x6 = x[6], *CL_RESTRICT x7 = x[7];
  const double s0 = scale[0], s1 = scale[1], s2 = scale[2], s3 = scale[3];
  const double s4 = scale[4], s5 = scale[5], s6 = scale[6], s7 = scale[7];
  for (std::int64_t i = 0; i < n; ++i) {
    const double first = (s0 * x0[i] + s1 * x1[i]) + (s2 * x2[i] + s3 * x3[i]);
    const double second = (s4 * x4[i] + s5 * x5[i]) + (s6 * x6[i] + s7 * x7[i]);
    y[i] -= first + second;
  }
}

// Rows scaled and subtracted, kLine at a time: add() as often as wanted, then finish().
struct RowSum {
  double* y;
  std::int64_t n;
  int held;
  double scale[kLine];
  const double* row[kLine];

  CL_INLINE void add(double s, const double* x) {
    scale[held] = s;
    row[held] = x;
    if (++held == kLine) {
      subtract_rows(scale, row, n, y);
      held = 0;
    }
  }
  CL_INLINE void finish() {
    for (int k = 0; k < held; ++k) subtract_scaled(scale[k], row[k], n, y);
    held = 0;
  }
};

// What a path keeps; all in the caller's scratch. "Set" below is the working set: all features with a Gram matrix, else
// some, numbered in order of joining. The root belongs to some of the members, the active ones, in order of becoming
// active.
struct LassoState {
  std::int64_t size, capacity;  // members of the set
  std::int64_t* members;        // [capacity], their features
  std::int64_t* place;          // [features], number in the set or -1
  const double* products;       // [capacity, stride]: the Gram matrix, or
  double* copied;               // products that were formed here
  std::int64_t stride;
  double* square;    // [capacity], diagonal of `products`
  double* w;         // [capacity]
  double* w_before;  // [capacity], solution of the penalty before
  double* w_saved;   // [capacity]
  double* inner;  // [capacity], gradient of the members while they are worked on; `gradient` itself with a Gram matrix
  double* inner_saved;      // [capacity]
  double* gradient;         // [features], X'r
  double* gradient_before;  // [features]
  double* residual;         // [images]; columns only
  double* masked;           // [images]; columns only

  std::int64_t active, most_active;  // members with a row in the root
  std::int64_t* actives;             // [most_active], their numbers in the set
  std::int64_t* slot;                // [capacity], row in the root or -1
  std::int64_t* leaving;             // [capacity]
  std::int64_t* entering;            // [capacity]
  double* sign;                      // [most_active]
  double* root;     // [most_active, most_active], upper triangle: root^T root = products of active members
  double* step;     // [most_active]
  double* columns;  // [kBlock, most_active]
};

CL_INLINE std::int64_t whole_lines(std::int64_t count) { return (count + kLine - 1) / kLine * kLine; }

CL_INLINE std::int64_t lasso_capacity(const LassoSets& sets) {
  const std::int64_t room = 2 * sets.images + 256;
  return whole_lines(sets.gram != nullptr || room > sets.features ? sets.features : room);
}

CL_INLINE std::int64_t lasso_most_active(const LassoSets& sets) {
  return whole_lines(sets.images > sets.features ? sets.features : sets.images);
}

std::int64_t lasso_scratch_doubles(const LassoSets& sets) {
  const std::int64_t c = lasso_capacity(sets), m = lasso_most_active(sets);
  return (sets.gram != nullptr ? 0 : c * c) + 10 * c + 3 * whole_lines(sets.features) + 2 * whole_lines(sets.images) +
         m * m + (3 + kBlock) * m;
}

CL_INLINE LassoState lasso_state(const LassoSets& sets, double* scratch) {
  static_assert(sizeof(std::int64_t) == sizeof(double), "numbers and indices share the scratch");
  const std::int64_t c = lasso_capacity(sets), m = lasso_most_active(sets);
  const std::int64_t p = whole_lines(sets.features), images = whole_lines(sets.images);
  double* next = scratch;
  const auto take = [&next](std::int64_t count) {
    double* taken = next;
    next += count;
    return taken;
  };
  const auto take_indices = [&take](std::int64_t count) { return reinterpret_cast<std::int64_t*>(take(count)); };
  LassoState s;
  s.size = 0;
  s.capacity = c;
  s.copied = sets.gram != nullptr ? nullptr : take(c * c);
  s.products = s.copied;
  s.stride = c;
  s.root = take(m * m);
  s.members = take_indices(c);
  s.place = take_indices(p);
  s.square = take(c);
  s.w = take(c);
  s.w_before = take(c);
  s.w_saved = take(c);
  s.inner = take(c);
  s.inner_saved = take(c);
  s.gradient = take(p);
  s.gradient_before = take(p);
  s.residual = take(images);
  s.masked = take(images);
  s.active = 0;
  s.most_active = m;
  s.actives = take_indices(m);
  s.slot = take_indices(c);
  s.leaving = take_indices(c);
  s.entering = take_indices(c);
  s.sign = take(m);
  s.step = take(m);
  s.columns = take(kBlock * m);
  return s;
}

CL_INLINE double* lasso_root_row(const LassoState& s, std::int64_t i) { return s.root + i * s.most_active; }

// Solve root^T y = y in place for `count` right-hand sides, `stride` apart.
CL_NOINLINE void lasso_forward(const LassoState& s, double* y, int count, std::int64_t stride) {
  const std::int64_t a = s.active;
  for (std::int64_t c = 0; c < a; c += kLine) {
    const std::int64_t rows = a - c < kLine ? a - c : kLine;
    const double* row[kLine];
    for (std::int64_t q = 0; q < rows; ++q) row[q] = lasso_root_row(s, c + q) + c;
    for (int k = 0; k < count; ++k) {
      double* right = y + k * stride + c;
      for (std::int64_t q = 0; q < rows; ++q) {
        right[q] /= row[q][q];
        for (std::int64_t r = q + 1; r < rows; ++r) right[r] -= right[q] * row[q][r];
      }
      if (rows < kLine) continue;
      const double* rest[kLine];
      for (int q = 0; q < kLine; ++q) rest[q] = row[q] + kLine;
      subtract_rows(right, rest, a - c - kLine, right + kLine);
    }
  }
}

// Solve root y = y in place.
CL_NOINLINE void lasso_backward(const LassoState& s, double* y) {
  for (std::int64_t c = s.active - 1; c >= 0; --c) {
    const double* row = lasso_root_row(s, c);
    y[c] = (y[c] - dot_f64(row + c + 1, y + c + 1, s.active - c - 1)) / row[c];
  }
}

// Up to kBlock members become active. One whose products depend linearly on those of the active ones does not; its
// column of the root stays in s.columns.
CL_NOINLINE void lasso_activate(LassoState& s, const std::int64_t* entering, const double* signs, int count) {
  for (int q = 0; q < count; ++q) {
    const double* row = s.products + entering[q] * s.stride;
    double* column = s.columns + q * s.most_active;
    for (std::int64_t i = 0; i < s.active; ++i) column[i] = row[s.actives[i]];
  }
  const std::int64_t before = s.active;
  lasso_forward(s, s.columns, count, s.most_active);
  for (int q = 0; q < count; ++q) {
    const double* row = s.products + entering[q] * s.stride;
    double* column = s.columns + q * s.most_active;
    const std::int64_t own = s.active;
    for (std::int64_t i = before; i < own; ++i) {  // those that came just before
      const double* up = lasso_root_row(s, i);
      double value = row[s.actives[i]];
      for (std::int64_t r = 0; r < i; ++r) value -= lasso_root_row(s, r)[i] * column[r];
      column[i] = value / up[i];
    }
    const double square = row[entering[q]], rest = square - dot_f64(column, column, own);
    if (!(rest > kDependent * square) || own == s.most_active) continue;
    for (std::int64_t i = 0; i < own; ++i) lasso_root_row(s, i)[own] = column[i];
    lasso_root_row(s, own)[own] = sqrt(rest);
    s.actives[own] = entering[q];
    s.sign[own] = signs[q];
    s.slot[entering[q]] = own;
    ++s.active;
  }
}

CL_INLINE void lasso_deactivate_all(LassoState& s) {
  for (std::int64_t i = 0; i < s.active; ++i) s.slot[s.actives[i]] = -1;
  s.active = 0;
}

// One member is no longer active: its column leaves the root, rotations make that triangular again.
CL_NOINLINE void lasso_deactivate(LassoState& s, std::int64_t e) {
  const std::int64_t hole = s.slot[e], last = --s.active;
  s.slot[e] = -1;
  for (std::int64_t i = 0; i <= last; ++i) {
    double* row = lasso_root_row(s, i);
    for (std::int64_t c = i > hole ? i - 1 : hole; c < last; ++c) row[c] = row[c + 1];
  }
  for (std::int64_t i = hole; i < last; ++i) {
    s.actives[i] = s.actives[i + 1];
    s.sign[i] = s.sign[i + 1];
    s.slot[s.actives[i]] = i;
    double *CL_RESTRICT upper = lasso_root_row(s, i), *CL_RESTRICT lower = lasso_root_row(s, i + 1);
    const double length = sqrt(upper[i] * upper[i] + lower[i] * lower[i]);
    const double cosine = upper[i] / length, sine = lower[i] / length;
    for (std::int64_t c = i; c < last; ++c) {
      const double u = upper[c], l = lower[c];
      upper[c] = cosine * u + sine * l;
      lower[c] = cosine * l - sine * u;
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
