// What an evolution optimiser does to whole populations of codes: counter-based random numbers, sampling, recombination.
//
// Every value is a function of its own indices only, and every sum runs in one fixed order written down here. So results have the
// same bits for any number of threads, any split of the problems into batches, and on every instruction set: only additions,
// multiplications and square roots are used, each rounded by itself, never fused.
#pragma once

#include <cstdint>

#include "cortexloop/status.h"

namespace cortexloop {

// Sums over columns: kPartialSums interleaved partial sums (column c goes to partial sum c % kPartialSums, in order), then a
// binary tree over these.
constexpr int kPartialSums = 64;

// Rows of random numbers: row r of problem p is a function of (seed, stream, problems[p], step, r) and of the column.
// Philox 4x32-10 (Salmon et al. 2011): key (seed low, seed high), counter (block, stream << 24 | r, step, problems[p]).
// Columns 64 g + 16 k + l take word k of block 16 g + l.
struct RandomRows {
  std::uint64_t seed;
  std::uint32_t stream;           // below 256
  std::uint32_t step;             // generation
  const std::int64_t* problems;   // [n_problems], each in [0, 2^32)
  std::int64_t n_problems, rows;  // rows below 2^24
  std::int64_t columns;
};

// I + left^T right for each problem, acting on row vectors: x -> x + (x left^T) right.
struct LowRank {
  const float* left;   // [n_problems, rank, columns]; null: rank 0
  const float* right;  // [n_problems, rank, columns]
  std::int64_t rank;
};

// out = mean + scale * (diagonal o z (I + left^T right)), z ~ N(0, I).
struct SampleArgs {
  RandomRows random;
  const float* mean;      // [n_problems, columns]
  const float* scale;     // [n_problems]
  const float* diagonal;  // [n_problems, columns]; null: ones
  LowRank factors;
  float* out;  // [n_problems, rows, columns]
};

// first = sum_r weights[r] codes[r]; second = sum_r weights[r] (codes[r] - centre)^2. Rows in order; those of weight 0 are skipped.
struct MomentsArgs {
  const float* codes;    // [n_problems, rows, columns]
  const float* weights;  // [n_problems, rows]
  const float* centre;   // [n_problems, columns]; null unless `second` is wanted
  std::int64_t n_problems, rows, columns;
  float* first;   // [n_problems, columns]
  float* second;  // [n_problems, columns]; null: not wanted
};

// out = x (I + left^T right).
struct LowRankArgs {
  const float* x;  // [n_problems, columns]
  LowRank factors;
  std::int64_t n_problems, columns;
  float* out;  // [n_problems, columns]
};

// out[p] = sum_c x[p, c] y[p, c].
struct RowDotsArgs {
  const float* x;  // [n_problems, columns]
  const float* y;  // [n_problems, columns]
  std::int64_t n_problems, columns;
  float* out;  // [n_problems]
};

namespace cpu {

Status random_uniforms(const RandomRows& random,
                       float* out);  // [n_problems, rows, columns], multiples of 2^-24 in [0, 1)
Status random_normals(const RandomRows& random, float* out);  // [n_problems, rows, columns], Box-Muller
Status sample_codes(const SampleArgs& args);
Status code_moments(const MomentsArgs& args);
Status low_rank_product(const LowRankArgs& args);
Status row_dots(const RowDotsArgs& args);

}  // namespace cpu
}  // namespace cortexloop
