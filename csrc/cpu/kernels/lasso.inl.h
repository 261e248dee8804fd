// Coordinate descent along one path of penalties; see cortexloop/lasso.h.
//
// Sweeps run over a working set of features whose products are copied into a dense matrix, so that they stay in cache: e^2
// numbers for e features, not e * features. Between sweeps, the gradient X'r of all features is brought up to date; features that
// violate the optimality conditions join the set. It is extrapolated along the path together with the weights, at no cost,
// because it depends on them linearly; so most that will be needed are known before the first sweep.
#pragma once

#include <cstring>

#include "../kernel_table.h"
#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kDotLanes = 32;         // partial sums of a dot product; added up by halves
constexpr double kNear = 0.95;        // share of the penalty from which on a feature joins the working set
constexpr double kInnerShare = 0.25;  // share of the allowed gap at which sweeps on the working set end

CL_INLINE double absolute(double x) { return x < 0.0 ? -x : x; }

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

// y -= sum of four rows x[k] * scale[k]
CL_NOINLINE void subtract_scaled4(const double* CL_RESTRICT scale, const double* const* x, std::int64_t n,
                                  double* CL_RESTRICT y) {
  const double *CL_RESTRICT x0 = x[0], *CL_RESTRICT x1 = x[1], *CL_RESTRICT x2 = x[2], *CL_RESTRICT x3 = x[3];
  const double s0 = scale[0], s1 = scale[1], s2 = scale[2], s3 = scale[3];
  for (std::int64_t i = 0; i < n; ++i) y[i] -= (s0 * x0[i] + s1 * x1[i]) + (s2 * x2[i] + s3 * x3[i]);
}

// Rows scaled and subtracted, four at a time: add() as often as wanted, then finish().
struct RowSum {
  double* y;
  std::int64_t n;
  int held;
  double scale[4];
  const double* row[4];

  CL_INLINE void add(double s, const double* x) {
    scale[held] = s;
    row[held] = x;
    if (++held == 4) {
      subtract_scaled4(scale, row, n, y);
      held = 0;
    }
  }
  CL_INLINE void finish() {
    for (int k = 0; k < held; ++k) subtract_scaled(scale[k], row[k], n, y);
    held = 0;
  }
};

// What a path keeps; all in the caller's scratch. "Set" below is the working set; its members are numbered in order of joining.
struct LassoState {
  std::int64_t size, capacity;  // members of the set
  std::int64_t* members;        // [capacity], their features
  std::int64_t* place;          // [features], number in the set or -1
  double* products;             // [capacity, capacity]
  double* w;                    // [capacity]
  double* w_known;              // [capacity], the weights that `gradient` belongs to
  double* w_before;             // [capacity], solution of the penalty before
  double* inner;                // [capacity], gradient of the members while they are swept
  double* gradient;             // [features], X'r
  double* gradient_before;      // [features]
  double* residual;             // [images]; columns only
  double* masked;               // [images]; columns only
};

CL_INLINE std::int64_t lasso_capacity(const LassoSets& sets) {
  const std::int64_t room = 2 * sets.images + 256;
  return sets.gram != nullptr || room > sets.features ? sets.features : room;
}

std::int64_t lasso_scratch_doubles(const LassoSets& sets) {
  const std::int64_t c = lasso_capacity(sets), p = sets.features;
  return c * c + 5 * c + 3 * p + (sets.gram == nullptr ? 2 * sets.images : 0);
}

CL_INLINE LassoState lasso_state(const LassoSets& sets, double* scratch) {
  static_assert(sizeof(std::int64_t) == sizeof(double), "members and places share the scratch");
  const std::int64_t c = lasso_capacity(sets), p = sets.features;
  LassoState s;
  s.size = 0;
  s.capacity = c;
  s.products = scratch;
  s.w = s.products + c * c;
  s.w_known = s.w + c;
  s.w_before = s.w_known + c;
  s.inner = s.w_before + c;
  s.members = reinterpret_cast<std::int64_t*>(s.inner + c);
  s.place = s.members + c;
  s.gradient = reinterpret_cast<double*>(s.place + p);
  s.gradient_before = s.gradient + p;
  s.residual = s.gradient_before + p;
  s.masked = s.residual + sets.images;
  return s;
}

// One training set of LassoSets.
struct LassoSet {
  const double *gram, *columns, *mask, *means, *diagonal;
  std::int64_t features, images;
};

CL_INLINE LassoSet lasso_set(const LassoSets& sets, std::int64_t number) {
  const std::int64_t p = sets.features;
  if (sets.gram != nullptr) {
    return {sets.gram + number * p * p, nullptr, nullptr, nullptr, sets.diagonal + number * p, p, 0};
  }
  return {nullptr, sets.columns, sets.mask + number * sets.images, sets.means + number * p, sets.diagonal + number * p,
          p,       sets.images};
}

// Let a feature join, with weight 0: its products with all members.
void lasso_join(const LassoSet& set, LassoState& s, std::int64_t feature) {
  const std::int64_t e = s.size++;
  s.members[e] = feature;
  s.place[feature] = e;
  s.w[e] = s.w_known[e] = s.w_before[e] = 0.0;
  double* row = s.products + e * s.capacity;
  if (set.gram != nullptr) {
    const double* from = set.gram + feature * set.features;
    for (std::int64_t k = 0; k <= e; ++k) row[k] = from[s.members[k]];
  } else {
    const double* own = set.columns + feature * set.images;
    double images = 0.0;
    for (std::int64_t i = 0; i < set.images; ++i) {
      s.masked[i] = set.mask[i] * own[i];
      images += set.mask[i];
    }
    for (std::int64_t k = 0; k < e; ++k) {
      const std::int64_t other = s.members[k];
      row[k] = dot_f64(s.masked, set.columns + other * set.images, set.images) -
               images * set.means[feature] * set.means[other];
    }
    row[e] = set.diagonal[feature];
  }
  for (std::int64_t k = 0; k < e; ++k) s.products[k * s.capacity + e] = row[k];
}

// Members of weight 0 leave, where there is no more room.
void lasso_make_room(LassoState& s) {
  std::int64_t kept = 0;
  for (std::int64_t e = 0; e < s.size; ++e) {
    if (s.w[e] == 0.0 && s.w_known[e] == 0.0 && s.w_before[e] == 0.0) {
      s.place[s.members[e]] = -1;
      continue;
    }
    // Rows move up and columns to the left; neither overwrites what is still to be read.
    if (kept != e) {
      s.members[kept] = s.members[e];
      s.place[s.members[kept]] = kept;
      s.w[kept] = s.w[e];
      s.w_known[kept] = s.w_known[e];
      s.w_before[kept] = s.w_before[e];
      std::memcpy(s.products + kept * s.capacity, s.products + e * s.capacity,
                  static_cast<std::size_t>(s.size) * sizeof(double));
      for (std::int64_t r = 0; r < s.size; ++r) s.products[r * s.capacity + kept] = s.products[r * s.capacity + e];
    }
    ++kept;
  }
  s.size = kept;
}

// The working set's share of a solution: sums over its members.
struct LassoSums {
  double norm;       // |w|_1
  double fitted;     // y'Xw
  double explained;  // y'Xw + r'Xw
  double steepest;   // largest |X'r| of a member
};

CL_INLINE LassoSums lasso_sums(const LassoState& s, const double* gradient_of_member, const double* cross) {
  LassoSums sums = {0.0, 0.0, 0.0, 0.0};
  for (std::int64_t e = 0; e < s.size; ++e) {
    const double w = s.w[e], g = gradient_of_member[e], c = cross[s.members[e]];
    sums.norm += absolute(w);
    sums.fitted += c * w;
    sums.explained += (c + g) * w;
    if (absolute(g) > sums.steepest) sums.steepest = absolute(g);
  }
  return sums;
}

// Primal less dual objective, the dual point being the residual scaled to be feasible.
CL_INLINE double lasso_gap(const LassoSums& sums, double steepest, double squares, double penalty) {
  double residual = squares - sums.explained;  // r'r
  if (residual < 0.0) residual = 0.0;
  const double scale = steepest > penalty ? penalty / steepest : 1.0;
  return 0.5 * (1.0 + scale * scale) * residual + penalty * sums.norm - scale * (squares - sums.fitted);
}

// One sweep over the working set; whether any weight changed.
CL_NOINLINE bool lasso_sweep(LassoState& s, double penalty) {
  bool changed = false;
  for (std::int64_t e = 0; e < s.size; ++e) {
    const double* row = s.products + e * s.capacity;
    const double square = row[e], old = s.w[e];
    const double pull = s.inner[e] + square * old;
    double w = 0.0;
    if (pull > penalty) w = (pull - penalty) / square;
    if (pull < -penalty) w = (pull + penalty) / square;
    if (w == old) continue;
    s.w[e] = w;
    subtract_scaled(w - old, row, s.size, s.inner);
    changed = true;
  }
  return changed;
}

// Bring the gradient of all features up to date with the weights.
void lasso_refresh(const LassoSet& set, LassoState& s, const double* responses) {
  if (set.gram != nullptr) {
    RowSum sum = {s.gradient, set.features, 0, {}, {}};
    for (std::int64_t e = 0; e < s.size; ++e) {
      const double step = s.w[e] - s.w_known[e];
      if (step != 0.0) sum.add(step, set.gram + s.members[e] * set.features);
    }
    sum.finish();
  } else {
    std::memcpy(s.residual, responses, static_cast<std::size_t>(set.images) * sizeof(double));
    RowSum sum = {s.residual, set.images, 0, {}, {}};
    for (std::int64_t e = 0; e < s.size; ++e) {
      if (s.w[e] != 0.0) sum.add(s.w[e], set.columns + s.members[e] * set.images);
    }
    sum.finish();
    double total = 0.0, images = 0.0;
    for (std::int64_t i = 0; i < set.images; ++i) {
      total += set.mask[i] * s.residual[i];
      images += set.mask[i];
    }
    const double mean = total / images;  // the columns are not centred over this set
    for (std::int64_t i = 0; i < set.images; ++i) s.residual[i] = set.mask[i] * (s.residual[i] - mean);
    for (std::int64_t j = 0; j < set.features; ++j) {
      s.gradient[j] = dot_f64(s.residual, set.columns + j * set.images, set.images);
    }
  }
  std::memcpy(s.w_known, s.w, static_cast<std::size_t>(s.size) * sizeof(double));
}

// Features whose gradient exceeds `limit` join the set, as far as there is room; whether any did.
bool lasso_join_all(const LassoSet& set, LassoState& s, double limit) {
  bool joined = false;
  for (std::int64_t j = 0; j < set.features; ++j) {
    if (s.place[j] >= 0 || !(absolute(s.gradient[j]) > limit) || set.diagonal[j] == 0.0) continue;
    if (s.size == s.capacity) lasso_make_room(s);
    if (s.size == s.capacity) break;
    lasso_join(set, s, j);
    joined = true;
  }
  return joined;
}

CL_INLINE double lasso_full_gap(const LassoSet& set, LassoState& s, const double* cross, double squares,
                                double penalty) {
  for (std::int64_t e = 0; e < s.size; ++e) s.inner[e] = s.gradient[s.members[e]];
  const LassoSums sums = lasso_sums(s, s.inner, cross);
  double steepest = 0.0;
  for (std::int64_t j = 0; j < set.features; ++j) {
    const double g = set.diagonal[j] == 0.0 ? 0.0 : absolute(s.gradient[j]);
    if (g > steepest) steepest = g;
  }
  return lasso_gap(sums, steepest, squares, penalty);
}

// Weights and gradients on the line through the last two solutions, a step as long as `ratio` times theirs.
void lasso_extrapolate(const LassoSet& set, LassoState& s, double ratio) {
  for (std::int64_t e = 0; e < s.size; ++e) {
    const double w = s.w[e];
    s.w_known[e] = s.w[e] = w + ratio * (w - s.w_before[e]);
    s.w_before[e] = w;
  }
  for (std::int64_t j = 0; j < set.features; ++j) {
    const double g = s.gradient[j];
    s.gradient[j] = g + ratio * (g - s.gradient_before[j]);
    s.gradient_before[j] = g;
  }
}

// All penalties of one problem. `scratch`: lasso_scratch_doubles numbers.
void lasso_problem(const LassoPathArgs& a, std::int64_t problem, double* scratch) {
  const LassoSet set = lasso_set(a.sets, a.set_of[problem]);
  LassoState s = lasso_state(a.sets, scratch);
  const std::int64_t p = set.features;
  const double* cross = a.cross + problem * p;
  const double* responses = set.gram == nullptr ? a.responses + problem * set.images : nullptr;
  const double* penalties = a.penalties + problem * a.n_penalties;
  const double squares = a.squares[problem], allowed = a.tolerance * squares;
  for (std::int64_t j = 0; j < p; ++j) {
    s.place[j] = -1;
    s.gradient[j] = s.gradient_before[j] = cross[j];
  }
  for (std::int64_t k = 0; k < a.n_penalties; ++k) {
    const double penalty = penalties[k];
    double ratio = 0.0;
    if (k >= 2 && penalties[k - 1] != penalties[k - 2]) {
      ratio = (penalty - penalties[k - 1]) / (penalties[k - 1] - penalties[k - 2]);
      if (!(ratio > 0.0 && ratio < 2.0)) ratio = 0.0;
    }
    lasso_extrapolate(set, s, ratio);
    std::int64_t sweeps = 0;
    double gap = lasso_full_gap(set, s, cross, squares, penalty);
    bool moving = true;
    double limit = kNear * penalty;
    while (gap > kInnerShare * allowed && moving && sweeps < a.max_sweeps) {
      moving = lasso_join_all(set, s, limit);
      limit = penalty;
      for (std::int64_t e = 0; e < s.size; ++e) s.inner[e] = s.gradient[s.members[e]];
      for (bool changed = true; changed && sweeps < a.max_sweeps;) {
        changed = lasso_sweep(s, penalty);
        ++sweeps;
        moving = moving || changed;
        const LassoSums sums = lasso_sums(s, s.inner, cross);
        if (lasso_gap(sums, sums.steepest, squares, penalty) <= kInnerShare * allowed) break;
      }
      lasso_refresh(set, s, responses);
      gap = lasso_full_gap(set, s, cross, squares, penalty);
    }
    double* weights = a.weights + (problem * a.n_penalties + k) * p;
    std::memset(weights, 0, static_cast<std::size_t>(p) * sizeof(double));
    for (std::int64_t e = 0; e < s.size; ++e) weights[s.members[e]] = s.w[e];
    a.gaps[problem * a.n_penalties + k] = squares > 0.0 ? gap / squares : gap;
    a.sweeps[problem * a.n_penalties + k] = sweeps;
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
