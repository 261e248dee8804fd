// Lasso along a path of penalties, many neurons on shared features.
//
// Minimises 1/2 |y - X w|^2 + penalty |w|_1 over w for each problem (a neuron on a training set) and each of its
// penalties, by Newton steps and coordinate descent. Features and responses are centred.
// Each penalty starts from the line through the two solutions before it.
//
// A problem stops when its duality gap is at most tolerance * y'y (1e-15 y'y if that is less), the gap being that of
// the dual point r min(1, penalty / |X'r|_inf) with r = y - X w. Sums run in one fixed order, products and sums are
// rounded by themselves, and problems share nothing: results have the same bits on every instruction set, and for any
// number of threads.
#pragma once

#include <cstdint>

#include "cortexloop/status.h"

namespace cortexloop {

// Training sets, in one of two forms. `gram`: products of features, best up to about three features per image.
// `columns`: the features of all images of all sets, of which a set has those where `mask` is 1.
struct LassoSets {
  const double* gram;      // [n_sets, features, features], symmetric; null: columns
  const double* columns;   // [features, images]; null: gram
  const double* mask;      // [n_sets, images], 0 or 1; null with gram
  const double* means;     // [n_sets, features]: mean of a column over the images of the set; null with gram
  const double* diagonal;  // [n_sets, features]: sums of squares of centred features; 0: that feature's weight stays 0
  std::int64_t n_sets, features, images;  // images of all sets together
};

struct LassoPathArgs {
  LassoSets sets;
  const std::int64_t* set_of;  // [n_problems], the training set of each problem, 0 to n_sets - 1
  const double* responses;     // [n_problems, images]: centred over the set, 0 outside of it; null with gram
  const double* cross;         // [n_problems, features]: X'y
  const double* squares;       // [n_problems]: y'y
  const double* penalties;     // [n_problems, n_penalties], positive, falling
  std::int64_t n_problems, n_penalties;
  double tolerance;         // at least 0
  std::int64_t max_sweeps;  // for each penalty, at least 1
  double* weights;          // [n_problems, n_penalties, features]
  double* gaps;             // [n_problems, n_penalties]: duality gap / y'y (as it is, where y'y is 0)
  std::int64_t* sweeps;     // [n_problems, n_penalties]
};

namespace cpu {

Status lasso_path(const LassoPathArgs& args);

}  // namespace cpu
}  // namespace cortexloop
