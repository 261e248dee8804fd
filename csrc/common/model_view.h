// From a row of the packed table to pointers, with every number checked against the buffer.
#pragma once

#include <cstdint>
#include <string>

#include "cortexloop/bank.h"

namespace cortexloop {

// One layer, resolved from the table. Padded channel counts (in_p, out_p) are multiples of kPaddedChannels.
struct LayerView {
  std::int32_t kernel, stride;
  std::int32_t in_c, out_c, in_p, out_p;
  std::int32_t in_h, in_w, out_h, out_w;
  std::int32_t pad_top, pad_left;
  const float* spatial;              // first layer [k, k, 3, out_p], others depthwise [k, k, in_p]
  const float* pointwise;            // [in_c, out_p]; null in the first layer
  const float* bias;                 // [out_p]
  const float* transposed;           // [out_c, in_p]; first layer [out_c, k, taps_p], null if it has a winograd kernel
  const float* winograd;             // first layer, 5 x 5, stride 1: [8, 6, 3, out_p]; else null
  const float* winograd_transposed;  // beside winograd: [8, out_c, 16]
  const float* pairs;  // pointwise in bfloat16, two channels to a slot: [ceil(in_c / 2), out_p]; null in the first
  const float* pixel_pairs;  // stride 2: depthwise in bfloat16, two pixels to a slot: [k, (k + 1) / 2, in_p]; else null
};

struct ModelView {
  std::int32_t depth;
  LayerView layers[kMaxDepth];
  const float* readout;  // [out_h, out_w, out_p] of the last layer
  float readout_bias;
};

// "" and a filled view, or one sentence about what is wrong or not taken by the kernels.
std::string resolve_model(const BankView& bank, std::int64_t model, ModelView* view);

}  // namespace cortexloop
