// What the host code (bank.cpp) and the kernels compiled once per instruction set share: plain structs and a function table.
#pragma once

#include <cstdint>

#include "../common/model_view.h"
#include "cortexloop/bank.h"
#include "cortexloop/evolution.h"
#include "cortexloop/lasso.h"
#include "cortexloop/moments.h"
#include "cortexloop/nmf.h"
#include "readout_kernels.h"

namespace cortexloop {
namespace cpu {

// One image as the kernels read it; made once, shared by all models of a bank.
struct PreparedImage {
  float* rows;  // [height + 6, row_stride]: recentred RGB, zero margins of 3 rows and 3 columns; null if unused
  std::int64_t row_stride;
  float* transformed;  // [height + 5, 3, 8, tiles_p]: rows in the Winograd domain; null if unused
  std::int32_t tiles_p;
};

struct ImageSource {
  const void* data;  // this image's first element
  bool is_u8;
  std::int64_t stride_y, stride_x, stride_c;  // in elements
  std::int32_t height, width;
  float mean[3];  // subtracted from 8-bit levels
};

// One row of random numbers, resolved from RandomRows: `row` carries the stream in its upper 8 bits.
struct RandomRow {
  std::uint32_t key0, key1, row, step, problem;
};

// Responses of a batch as the moments kernel reads them. Rows are images, then two that complete Chan's merge: f * shift, which
// meets d, and minus the sum of `centred`, which meets the difference of the batch's mean from the centre that was used.
constexpr int kResponseGroup = 8;

struct MomentsJob {
  FeatureMomentsArgs args;
  const float* weights;    // [images]
  const float* responses;  // [ceil(neurons / kResponseGroup), images + 2, kResponseGroup], zeros beyond the last neuron
};

struct Kernels {
  const char* name;
  bool has_fast;

  // Bytes of the two buffers of PreparedImage, which `prepare` lays out in `memory` and fills.
  std::int64_t (*prepared_bytes)(std::int32_t height, std::int32_t width, bool rows, bool transformed);
  void (*prepare)(const ImageSource& source, bool rows, bool transformed, void* memory, PreparedImage* image);

  // Bytes of scratch one call needs, and the calls. `scratch` is aligned to 64 bytes and holds nothing between calls, unless
  // `repeat` says so.
  std::int64_t (*scratch_bytes)(const ModelView& model, bool gradient);
  float (*forward)(const ModelView& model, const PreparedImage& image, bool fast, void* scratch);
  // Adds cotangent * d response / d image to `grad` [height, width, 3] (sets it if `overwrite`); returns the response.
  // `repeat`: the call before, with this scratch, was for the same image and the same layers, with whatever readout. Its
  // forward pass serves again, and 0 is returned.
  float (*gradient)(const ModelView& model, const PreparedImage& image, float cotangent, bool overwrite, bool repeat,
                    float* grad, void* scratch);

  // Populations of codes, a row or a block of columns at a time. `factors`, `mean`, `diagonal`: those of one problem; `dots` has
  // room for `factors.rank` numbers.
  void (*random_row)(const RandomRow& row, bool normal, std::int64_t columns, float* out);
  void (*sample_row)(const RandomRow& row, const float* mean, float scale, const float* diagonal,
                     const LowRank& factors, std::int64_t columns, float* dots, float* out);
  void (*low_rank_row)(const float* left, const float* right, std::int64_t rank, std::int64_t columns, float* dots,
                       float* x);
  float (*dot)(const float* a, const float* b, std::int64_t columns);
  void (*moments_block)(const float* codes, const float* weights, const float* centre, std::int64_t rows,
                        std::int64_t columns, std::int64_t count, float* first, float* second);

  // Running moments of the columns [begin, end), `begin` a multiple of `moments_tile`; `scratch` is aligned to 64 bytes and has
  // `moments_scratch_bytes`.
  std::int64_t moments_tile, moments_scratch_bytes;
  void (*feature_moments)(const MomentsJob& job, std::int64_t begin, std::int64_t end, void* scratch);
  // One problem of a lasso, and the doubles of scratch that it needs.
  std::int64_t (*lasso_scratch_doubles)(const LassoSets& sets);
  void (*lasso_problem)(const LassoPathArgs& args, std::int64_t problem, double* scratch);
  ReadoutKernels readout;

  // One non-negative factorization, and the floats of scratch that it needs.
  std::int64_t (*nmf_scratch_floats)(const NmfArgs& args);
  void (*nmf_problem)(const NmfArgs& args, std::int64_t problem, float* scratch);
};

const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_neon();

}  // namespace cpu
}  // namespace cortexloop
