// Fills the function table of the instruction set this file is compiled for.
#pragma once

#include "../kernel_table.h"
#include "bank_bwd.inl.h"
#include "evolution.inl.h"
#include "lasso.inl.h"
#include "moments.inl.h"
#include "nmf.inl.h"
#include "point_readout.inl.h"
#include "readout.inl.h"

namespace cortexloop {
namespace cpu {
namespace {

inline std::int64_t scratch_bytes(const ModelView& model, bool gradient) {
  return gradient ? backward_scratch_bytes(model) : forward_scratch_bytes(model);
}

#if defined(CORTEXLOOP_ISA_BF16)
constexpr bool kHasFast = true;
#else
constexpr bool kHasFast = false;
#endif

constexpr ReadoutKernels kReadoutKernels = {
    readout_transpose,      readout_image,      readout_images, readout_add,
    readout_back_features,  readout_back_image, readout_outer,  readout_contract,
    readout_back_transpose, point_taps,         point_sums,     point_features,
    point_scatter};

constexpr Kernels make_kernels(const char* name) {
  return Kernels{name,
                 kHasFast,
                 prepared_bytes,
                 prepare_image,
                 scratch_bytes,
                 bank_forward,
                 bank_gradient,
                 random_row,
                 sample_row,
                 low_rank_row,
                 dot,
                 moments_block,
                 kMomentsTile,
                 kMomentsScratchBytes,
                 moments_columns,
                 lasso_scratch_doubles,
                 lasso_problem,
                 kReadoutKernels,
                 nmf_scratch_floats,
                 nmf_problem};
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
