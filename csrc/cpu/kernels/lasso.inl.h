// Lasso along one path of penalties; see cortexloop/lasso.h.
//
// Newton steps on the features in use solve the optimality conditions exactly once their signs are right; where they do
// not get there, sweeps of coordinate descent, which always do, take over for a while. Weights and the gradient X'r are
// extrapolated along the path together, at no cost, because one depends linearly on the other; so most features that
// will be needed are known beforehand.
//
// Without a Gram matrix, work goes on within a set of features, whose products are formed as they join. Between times
// the gradient of all features follows from the residual, and those that violate the conditions join.
#pragma once

#include "lasso_root.inl.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr double kNear = 0.95;   // share of the penalty from which on a feature joins the set
constexpr double kShare = 1e-3;  // share of the allowed gap that is aimed at, as a Newton step has it for little more
constexpr double kResolved = 1e-15;  // gap / y'y that double precision can still tell from 0
constexpr int kNewtonSteps = 8;      // in a row
constexpr int kSweeps = 3;           // in a row

CL_INLINE double absolute(double x) { return x < 0.0 ? -x : x; }

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

// All features are members, with weight 0.
void lasso_take_all(const LassoSet& set, LassoState& s) {
  s.size = set.features;
  s.products = set.gram;
  s.stride = set.features;
  s.inner = s.gradient;
  for (std::int64_t e = 0; e < s.size; ++e) {
    s.members[e] = s.place[e] = e;
    s.slot[e] = -1;
    s.w[e] = s.w_before[e] = 0.0;
    s.square[e] = set.diagonal[e];
  }
}

// Let a feature join, with weight 0: its products with all members.
void lasso_join(const LassoSet& set, LassoState& s, std::int64_t feature) {
  const std::int64_t e = s.size++;
  s.members[e] = feature;
  s.place[feature] = e;
  s.slot[e] = -1;
  s.w[e] = s.w_before[e] = 0.0;
  double* row = s.copied + e * s.stride;
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
    s.copied[k * s.stride + e] = row[k];
  }
  row[e] = s.square[e] = set.diagonal[feature];
}

// Members of weight 0 leave, where there is no more room.
void lasso_make_room(LassoState& s) {
  lasso_deactivate_all(s);
  std::int64_t kept = 0;
  for (std::int64_t e = 0; e < s.size; ++e) {
    if (s.w[e] == 0.0 && s.w_before[e] == 0.0) {
      s.place[s.members[e]] = -1;
      continue;
    }
    // Rows move up and columns to the left; neither overwrites what is still to be read.
    if (kept != e) {
      s.members[kept] = s.members[e];
      s.place[s.members[kept]] = kept;
      s.square[kept] = s.square[e];
      s.w[kept] = s.w[e];
      s.w_before[kept] = s.w_before[e];
      std::memcpy(s.copied + kept * s.stride, s.copied + e * s.stride,
                  static_cast<std::size_t>(s.size) * sizeof(double));
      for (std::int64_t r = 0; r < s.size; ++r) s.copied[r * s.stride + kept] = s.copied[r * s.stride + e];
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
  bool idle;         // there is a weight that would be better 0
};

CL_NOINLINE LassoSums lasso_sums(const LassoState& s, const double* cross, double penalty) {
  LassoSums sums = {0.0, 0.0, 0.0, 0.0, false};
  for (std::int64_t e = 0; e < s.size; ++e) {
    const double w = s.w[e], g = s.inner[e], c = cross[s.members[e]];
    sums.norm += absolute(w);
    sums.fitted += c * w;
    sums.explained += (c + g) * w;
    if (absolute(g) > sums.steepest && s.square[e] > 0.0) sums.steepest = absolute(g);
    if (w != 0.0 && absolute(g + s.square[e] * w) <= penalty) sums.idle = true;
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

// Change a member's weight, and the gradient of the set with it.
CL_INLINE void lasso_move(LassoState& s, std::int64_t e, double w) {
  subtract_scaled(w - s.w[e], s.products + e * s.stride, s.size, s.inner);
  s.w[e] = w;
}

CL_INLINE double lasso_objective(const LassoState& s, const double* cross, double squares, double penalty) {
  const LassoSums sums = lasso_sums(s, cross, penalty);
  return 0.5 * (squares - sums.explained) + penalty * sums.norm;
}

// One sweep over the working set; whether any weight changed.
CL_NOINLINE bool lasso_sweep(LassoState& s, double penalty) {
  bool changed = false;
  for (std::int64_t e = 0; e < s.size; ++e) {
    const double square = s.square[e];
    if (!(square > 0.0)) continue;
    const double pull = s.inner[e] + square * s.w[e];
    double w = 0.0;
    if (pull > penalty) w = (pull - penalty) / square;
    if (pull < -penalty) w = (pull + penalty) / square;
    if (w == s.w[e]) continue;
    lasso_move(s, e, w);
    changed = true;
  }
  return changed;
}

// The step that solves the optimality conditions for the active members with their signs, to s.step.
CL_INLINE void lasso_direction(LassoState& s, double penalty) {
  for (std::int64_t i = 0; i < s.active; ++i) s.step[i] = s.inner[s.actives[i]] - penalty * s.sign[i];
  lasso_forward(s, s.step, 1, 0);
  lasso_backward(s, s.step);
}

CL_NOINLINE void lasso_move_active(LassoState& s, double length) {
  RowSum sum = {s.inner, s.size, 0, {}, {}};
  for (std::int64_t i = 0; i < s.active; ++i) {
    const std::int64_t e = s.actives[i];
    const double step = length * s.step[i];
    s.w[e] += step;
    sum.add(step, s.products + e * s.stride);
  }
  sum.finish();
}

// A member depends on the active ones, or all but: there is a direction that changes their weights and hardly the
// prediction. A step along it, downhill, ends at the minimum or where a weight reaches 0. Whether another member may
// have become free to follow, because it was that of an active one.
bool lasso_pivot(LassoState& s, std::int64_t e, double penalty) {
  double* share = s.columns;  // root^T share = products of e with the active members, as lasso_activate left it
  const double curvature = s.square[e] - dot_f64(share, share, s.active);
  lasso_backward(s, share);
  double slope = (s.w[e] > 0.0 ? penalty : -penalty) - s.inner[e];
  for (std::int64_t i = 0; i < s.active; ++i) slope -= (s.sign[i] * penalty - s.inner[s.actives[i]]) * share[i];
  const double way = slope > 0.0 ? -1.0 : 1.0;
  double length = curvature > 0.0 ? absolute(slope) / curvature : HUGE_VAL;
  std::int64_t first = -1;
  if (s.w[e] * way < 0.0 && absolute(s.w[e]) <= length) {
    length = absolute(s.w[e]);
    first = e;
  }
  for (std::int64_t i = 0; i < s.active; ++i) {
    const double w = s.w[s.actives[i]];
    s.step[i] = -way * share[i];
    if (s.sign[i] * (w + length * s.step[i]) < 0.0) {
      length = -w / s.step[i];
      first = s.actives[i];
    }
  }
  if (length == HUGE_VAL) return false;  // flat, by rounding
  lasso_move_active(s, length);
  lasso_move(s, e, first == e ? 0.0 : s.w[e] + way * length);
  if (first < 0 || first == e) return false;
  lasso_move(s, first, 0.0);
  lasso_deactivate(s, first);
  return true;
}

// Newton steps that never go uphill: the active members are those that have a weight, and a step ends where the first
// of them reaches 0, which then leaves (as in the feature-sign search of Lee et al. 2006).
void lasso_descend(LassoState& s, double penalty) {
  lasso_deactivate_all(s);  // for a new root: rotations wear it
  for (std::int64_t e = 0; e < s.size; ++e) {
    while (s.slot[e] < 0 && s.w[e] != 0.0) {
      const double sign = s.w[e] > 0.0 ? 1.0 : -1.0;
      lasso_activate(s, &e, &sign, 1);
      if (s.slot[e] < 0 && !lasso_pivot(s, e, penalty)) break;
    }
  }
  while (s.active > 0) {
    lasso_direction(s, penalty);
    double length = 1.0;
    std::int64_t first = -1;
    for (std::int64_t i = 0; i < s.active; ++i) {
      const double w = s.w[s.actives[i]], step = s.step[i];
      if (s.sign[i] * (w + length * step) < 0.0) {
        length = -w / step;
        first = s.actives[i];
      }
    }
    lasso_move_active(s, length);
    if (first < 0) break;
    lasso_move(s, first, 0.0);
    lasso_deactivate(s, first);
  }
}

// A Newton step: which members are active follows from weights and gradients as in a primal-dual active set method
// (Hintermueller, Ito & Kunisch 2003); their weights then solve the optimality conditions with these signs. Returns how
// many came or went.
CL_NOINLINE std::int64_t lasso_newton(LassoState& s, double penalty) {
  std::int64_t leaving = 0, entering = 0;
  for (std::int64_t e = 0; e < s.size; ++e) {
    const double pull = s.inner[e] + s.square[e] * s.w[e];
    if (s.slot[e] >= 0) {
      if (pull * s.sign[s.slot[e]] <= penalty) s.leaving[leaving++] = e;
    } else if (absolute(pull) > penalty && s.square[e] > 0.0) {
      s.entering[entering++] = e;
    } else if (s.w[e] != 0.0) {
      lasso_move(s, e, 0.0);
    }
  }
  for (std::int64_t q = 0; q < leaving; ++q) lasso_deactivate(s, s.leaving[q]);
  for (std::int64_t q = 0; q < entering; q += kBlock) {
    const int count = static_cast<int>(entering - q < kBlock ? entering - q : kBlock);
    double signs[kBlock];
    for (int r = 0; r < count; ++r) {
      const std::int64_t e = s.entering[q + r];
      signs[r] = s.inner[e] + s.square[e] * s.w[e] > 0.0 ? 1.0 : -1.0;
    }
    lasso_activate(s, s.entering + q, signs, count);
  }
  for (std::int64_t q = 0; q < leaving; ++q) {
    if (s.w[s.leaving[q]] != 0.0) lasso_move(s, s.leaving[q], 0.0);
  }
  lasso_direction(s, penalty);
  lasso_move_active(s, 1.0);
  return leaving + entering;
}

// Gradient of all features from the weights alone, which frees it of the rounding of all steps so far.
void lasso_refresh(const LassoSet& set, LassoState& s, const double* cross, const double* responses) {
  if (set.gram != nullptr) {
    std::memcpy(s.gradient, cross, static_cast<std::size_t>(set.features) * sizeof(double));
    RowSum sum = {s.gradient, set.features, 0, {}, {}};
    for (std::int64_t e = 0; e < s.size; ++e) {
      if (s.w[e] != 0.0) sum.add(s.w[e], s.products + e * s.stride);
    }
    sum.finish();
    return;
  }
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

CL_INLINE double lasso_full_gap(const LassoSet& set, LassoState& s, const double* cross, double squares, double penalty,
                                bool* idle) {
  if (set.gram == nullptr) {
    for (std::int64_t e = 0; e < s.size; ++e) s.inner[e] = s.gradient[s.members[e]];
  }
  const LassoSums sums = lasso_sums(s, cross, penalty);
  *idle = sums.idle;
  if (set.gram != nullptr) return lasso_gap(sums, sums.steepest, squares, penalty);
  double steepest = 0.0;
  for (std::int64_t j = 0; j < set.features; ++j) {
    const double g = set.diagonal[j] == 0.0 ? 0.0 : absolute(s.gradient[j]);
    if (g > steepest) steepest = g;
  }
  return lasso_gap(sums, steepest, squares, penalty);
}

// Weights and gradients on the line through the last two solutions, a step as long as `ratio` times theirs.
CL_NOINLINE void lasso_extrapolate(const LassoSet& set, LassoState& s, double ratio) {
  for (std::int64_t e = 0; e < s.size; ++e) {
    const double w = s.w[e];
    s.w[e] = w + ratio * (w - s.w_before[e]);
    s.w_before[e] = w;
  }
  for (std::int64_t j = 0; j < set.features; ++j) {
    const double g = s.gradient[j];
    s.gradient[j] = g + ratio * (g - s.gradient_before[j]);
    s.gradient_before[j] = g;
  }
}

// Work on the members until their gap is at most `aim`, or `allowed` if that does not get nearer: Newton steps, and
// where these do not get there, sweeps. Whether any weight changed.
bool lasso_work(LassoState& s, const double* cross, double squares, double penalty, double aim, double allowed,
                std::int64_t max_sweeps, std::int64_t* sweeps) {
  const auto gap_now = [&]() {
    const LassoSums sums = lasso_sums(s, cross, penalty);
    const double found = lasso_gap(sums, sums.steepest, squares, penalty);
    return sums.idle && found <= aim ? 2.0 * aim : found;
  };
  const std::size_t bytes = static_cast<std::size_t>(s.size) * sizeof(double);
  bool moved = false;
  double gap = gap_now();
  for (double enough = aim; gap > enough && *sweeps < max_sweeps; enough = allowed) {
    std::memcpy(s.w_saved, s.w, bytes);
    std::memcpy(s.inner_saved, s.inner, bytes);
    const double objective = lasso_objective(s, cross, squares, penalty);
    for (int round = 0; round < kNewtonSteps && gap > aim && *sweeps < max_sweeps; ++round) {
      const double before = gap;
      const std::int64_t changes = lasso_newton(s, penalty);
      ++*sweeps;
      gap = gap_now();
      if (changes == 0 && !(gap < 0.5 * before)) break;
    }
    if (lasso_objective(s, cross, squares, penalty) <= objective) {
      moved = true;
    } else {  // also for a NaN
      std::memcpy(s.w, s.w_saved, bytes);
      std::memcpy(s.inner, s.inner_saved, bytes);
      lasso_deactivate_all(s);
      gap = gap_now();
    }
    bool changed = true;
    for (int round = 0; round < kSweeps && changed && gap > aim && *sweeps < max_sweeps; ++round) {
      changed = lasso_sweep(s, penalty);
      ++*sweeps;
      gap = gap_now();
      moved = moved || changed;
    }
    if (!changed) break;
    if (gap > aim) {
      lasso_descend(s, penalty);
      gap = gap_now();
    }
  }
  return moved;
}

// Weights that pull against their gradient go to 0: rounding leaves such ones where features depend on each other, too
// small to be seen in the gap, yet with the wrong sign for the optimality conditions. Whether there was any.
bool lasso_drop_misfits(LassoState& s) {
  bool dropped = false;
  for (std::int64_t e = 0; e < s.size; ++e) {
    if (!(s.w[e] * s.inner[e] < 0.0)) continue;
    lasso_move(s, e, 0.0);
    dropped = true;
  }
  return dropped;
}

// All penalties of one problem. `scratch`: lasso_scratch_doubles numbers.
void lasso_problem(const LassoPathArgs& a, std::int64_t problem, double* scratch) {
  const LassoSet set = lasso_set(a.sets, a.set_of[problem]);
  LassoState s = lasso_state(a.sets, scratch);
  const std::int64_t p = set.features;
  const double* cross = a.cross + problem * p;
  const double* responses = set.gram == nullptr ? a.responses + problem * set.images : nullptr;
  const double* penalties = a.penalties + problem * a.n_penalties;
  const double squares = a.squares[problem];
  const double resolved = kResolved * squares, wanted = a.tolerance * squares;
  const double allowed = wanted > resolved ? wanted : resolved;
  const double aim = kShare * allowed > resolved ? kShare * allowed : resolved;
  for (std::int64_t j = 0; j < p; ++j) {
    s.place[j] = -1;
    s.gradient[j] = s.gradient_before[j] = cross[j];
  }
  if (set.gram != nullptr) lasso_take_all(set, s);
  for (std::int64_t k = 0; k < a.n_penalties; ++k) {
    const double penalty = penalties[k];
    double ratio = 0.0;
    if (k >= 2 && penalties[k - 1] != penalties[k - 2]) {
      ratio = (penalty - penalties[k - 1]) / (penalties[k - 1] - penalties[k - 2]);
      if (!(ratio > 0.0 && ratio < 2.0)) ratio = 0.0;
    }
    lasso_extrapolate(set, s, ratio);
    std::int64_t sweeps = 0;
    bool idle = false;
    double gap = lasso_full_gap(set, s, cross, squares, penalty, &idle);
    double limit = kNear * penalty;
    double before = 0.0;
    bool exact = false;  // not before the gradient was formed anew
    for (bool moving = true; (gap > aim || idle || !exact) && moving && sweeps < a.max_sweeps; limit = penalty) {
      if (before > 0.0 && !idle && gap <= allowed && gap > 0.5 * before)
        break;  // good enough, and hardly getting better
      before = gap;
      moving = false;
      if (set.gram == nullptr) {
        moving = lasso_join_all(set, s, limit);
        for (std::int64_t e = 0; e < s.size; ++e) s.inner[e] = s.gradient[s.members[e]];
      }
      moving = lasso_work(s, cross, squares, penalty, aim, allowed, a.max_sweeps, &sweeps) || moving;
      lasso_refresh(set, s, cross, responses);
      exact = true;
      gap = lasso_full_gap(set, s, cross, squares, penalty, &idle);
    }
    if (lasso_drop_misfits(s)) {
      lasso_refresh(set, s, cross, responses);
      gap = lasso_full_gap(set, s, cross, squares, penalty, &idle);
    }
    double* weights = a.weights + (problem * a.n_penalties + k) * p;
    std::memset(weights, 0, static_cast<std::size_t>(p) * sizeof(double));
    for (std::int64_t e = 0; e < s.size; ++e) weights[s.members[e]] = s.w[e];
    a.gaps[problem * a.n_penalties + k] = gap < 0.0 ? 0.0 : (squares > 0.0 ? gap / squares : gap);
    a.sweeps[problem * a.n_penalties + k] = sweeps;
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
