// A bank as the CUDA kernels read it: one header, one record per model, then sections of numbers. Made on the host by
// packed.cpp, copied to the device once; offsets count bytes from its start.
//
// A model of the *published form* (5 x 5 full convolution, then two separable 5 x 5 layers of stride 2, then any further
// layers) has a head: its first three layers run fused, with products on tensor cores. All other layers run one at a
// time from the plain sections of LayerRecord.
//
// Half precision with a known error. Operands of the tensor cores are halves. In the exact mode a number is the sum of
// two halves, which keeps 22 bits, and a product is three products (two where one factor is an 8-bit pixel). Numbers are
// scaled by powers of two, so that nothing overflows and little underflows: weights per output, maps by bounds that hold
// for every image of recentred pixel values up to kLargestPixel.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cortexloop/bank.h"
#include "device.h"

namespace cortexloop::cuda {

constexpr float kLargestPixel = 4096;  // recentred pixels lie within 156; leaves room for images of any other kind
constexpr int kHalfBound = 15;         // scaled maps stay below 2^15; halves reach 65504
// What a head may be at most. Everything in shared memory has the place and the strides that this takes, whatever the
// model, so that addresses in the inner loops are constants; published models come close to it.
constexpr int kMaxWidth = 112;
constexpr int kMaxPairs1 = 32, kMaxPairs2 = 64;  // pairs of channels of the first and the second map

constexpr int kFirstKernel = 5;
constexpr int kAfterHead = 3;  // the first layer behind a head

// One layer. Maps are [height, width, channels] without padding.
struct LayerRecord {
  std::int32_t kernel, stride, pad_top, pad_left;
  std::int32_t in_c, in_h, in_w, out_c, out_h, out_w;
  std::int64_t spatial;    // first layer [k, k, 3, out_c], others depthwise [k, k, in_c]
  std::int64_t pointwise;  // [in_c, out_c]; unused in the first layer
  std::int64_t bias;       // [out_c]
  std::int64_t rest;       // where its output lies among the maps of RestRecord; floats
};

// The layers that run one at a time, from `begin` on (behind a head: 3; without one: 1), and how their maps share one
// buffer: outputs one behind the other, then what a layer needs between its two parts, then, for a gradient, two more
// maps. All in floats.
struct RestRecord {
  std::int32_t begin;
  std::int64_t between, floats;                // start; size without gradients
  std::int64_t gradients[2], gradient_floats;  // starts; size with gradients
};

// A matrix [K, N] as B fragments of mma_16816: [planes][n_tiles][k_tiles][32 lanes] of two registers. Plane 0 holds the
// halves nearest to the scaled weights, plane 1 what is left.
struct MatrixRecord {
  std::int32_t k_tiles, n_tiles;
  std::int64_t fragments;
  // How sums of products become numbers: float4 [n_tiles * 4], the scales of a pair of columns and what is added.
  std::int64_t outputs;
};

// Depthwise taps [25, kMaxPairs1 or kMaxPairs2] of pairs of channels, scaled; zeros behind the real channels. `pairs`:
// whole tiles of the matrix product that follows.
struct TapsRecord {
  std::int32_t pairs;
  std::int64_t halves;  // __half2
  std::int64_t floats;  // float2
  float unscale;        // taps * unscale are the weights
};

struct HeadRecord {
  std::int32_t channels0, channels1, channels2;
  MatrixRecord first;  // [80, channels0]: row dy * 16 + dx * 3 + colour
  std::int64_t
      first_u8;  // `outputs` for pixels that are levels minus the rounded mean; first.outputs: recentred values
  TapsRecord taps1, taps2;
  MatrixRecord mix1, mix2;   // pointwise layers
  MatrixRecord mix1_back;    // [channels1, channels0]
  MatrixRecord first_back;   // [channels0, 80]: column dy * 16 + dx * 3 + colour
  std::int64_t mix2_back;    // [channels2, 2 * taps2.pairs] float
  float largest1, largest0;  // of the gradients of the two maps before ReLU masks, per unit of the third map's
};

struct ModelRecord {
  std::int32_t depth;
  std::int32_t has_head;
  std::int32_t height, width;
  LayerRecord layers[kMaxDepth];
  HeadRecord head;
  RestRecord rest;
  std::int64_t readout;  // [last height, width, channels]
  float readout_bias;
};

struct PackedHeader {
  std::int32_t n_models;
  float mean[3];
  std::int64_t models;       // ModelRecord [n_models]
  std::int64_t head_order;   // int32: models with a head, most expensive first
  std::int64_t plain_order;  // int32: the others, likewise
  std::int64_t slots;        // int32 [n_models]: place in head_order, or -1 - place in plain_order
};

// Host side: a checked bank in this form. Offsets in the header and in the records count from the start of `bytes`.
struct PackedBank {
  std::vector<unsigned char> bytes;
  std::vector<ModelRecord> models;
  std::vector<std::int32_t> heads, plains;

  const PackedHeader& header() const { return *reinterpret_cast<const PackedHeader*>(bytes.data()); }
};

// "" if the kernels take this bank, otherwise one sentence; and how many of its models have a head. Reads only the table.
std::string describe_bank(const BankView& host, int* heads);

Status pack_bank(const BankView& host, PackedBank* packed);

// What a kernel gets, by value.
struct BankRef {
  const unsigned char* packed;

  template <class T>
  __device__ const T* at(std::int64_t offset) const {
    return reinterpret_cast<const T*>(packed + offset);
  }
  __device__ const PackedHeader& header() const { return *at<PackedHeader>(0); }
  __device__ const ModelRecord& model(int index) const { return at<ModelRecord>(header().models)[index]; }
};

}  // namespace cortexloop::cuda
