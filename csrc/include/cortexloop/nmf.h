// Non-negative factorizations of many small matrices by cyclic coordinate descent.
//
// Minimises 1/2 |X - W' H|^2 + l1_w |W| + l2_w/2 |W|^2 + l1_h |H| + l2_h/2 |H|^2 over W, H >= 0 for every problem (a neuron). With
// `is_signed`, X is the positive and the negative part of M side by side, [max(M, 0), max(-M, 0)], and is never written out.
//
// One iteration sweeps once over the rows of W, then of H; each entry goes to its best value given the others. A problem stops when
// the sum of |projected gradients|, each taken just before its entry's update, falls to `tolerance` of that of its first iteration.
#pragma once

#include <cstdint>

#include "cortexloop/status.h"

namespace cortexloop {

struct NmfArgs {
  const float* matrices;  // [problems, rows, columns]: M, of either sign with is_signed, else at least 0
  std::int64_t problems, rows, columns, rank;
  bool is_signed;
  float l1_w, l2_w, l1_h, l2_h;  // at least 0
  float tolerance;               // at least 0
  std::int64_t max_iterations;   // at least 1
  float* w;                      // [problems, rank, rows], at least 0: the start, then the result
  float* h;                      // [problems, rank, columns or 2 * columns], at least 0: the start, then the result
  std::int64_t* iterations;      // [problems]
};

namespace cpu {

Status nmf(const NmfArgs& args);

}  // namespace cpu
}  // namespace cortexloop
