// What the host hands to the kernels, and the launch functions. One unit of work is one (image, model).
#pragma once

#include "cortexloop/status.h"
#include "head_back.h"
#include "layers.h"

namespace cortexloop::cuda {

// Units are numbered. Without pairs a kernel serves `count` models of `order` for every image of the batch; with pairs it
// serves the images whose model has a head, or those whose has none.
struct UnitsRef {
  BankRef bank;
  ImagesRef images;
  const std::int64_t* pairs;  // [batch] or null
  const std::int32_t* order;  // [count] models, if pairs is null
  std::int32_t count, n_models;
  std::int64_t batch, first_image;  // images first_image .. first_image + batch - 1
  std::uint32_t units;

  // Workspace: a counter from which blocks draw, then one area for each block (or unit, if units are cut into bands).
  std::uint32_t* next;
  unsigned char* areas;
  std::int64_t area_bytes;
  std::int32_t shared_bytes;  // of a block

  const unsigned char* prepared;  // the images of this round as heads read them, with this many planes each
  std::int32_t planes;
};

__device__ __forceinline__ const uint4* prepared_image(const UnitsRef& u, std::int64_t image) {
  return reinterpret_cast<const uint4*>(u.prepared +
                                        (image - u.first_image) * prepared_bytes(u.images.height, u.planes));
}

__device__ __forceinline__ unsigned char* area_of(const UnitsRef& u, std::uint32_t index) {
  return u.areas + index * u.area_bytes;
}

// Bytes in an area are taken in whole lines.
__host__ __device__ inline std::int64_t aligned(std::int64_t bytes) { return (bytes + 127) / 128 * 128; }

struct Unit {
  std::uint32_t number, band;
  std::int32_t model;
  bool any, mine;      // false: no unit is left; the unit belongs to another kernel
  std::int64_t image;  // in the whole batch
  std::int64_t out;    // position in responses and cotangent
};

// The block's next unit. It lies in shared memory and stays until the next call, which waits for all threads.
//
// Pairs are checked by the caller; one outside the bank, which only a caller without checks could pass, belongs to no
// kernel and leaves its response as it was.
__device__ __forceinline__ const Unit& draw(const UnitsRef& u, bool heads, std::uint32_t bands = 1) {
  __shared__ Unit unit;
  __syncthreads();
  if (threadIdx.x == 0) {
    const std::uint32_t drawn = atomicAdd(u.next, 1u);
    unit.number = drawn / bands;
    unit.band = drawn - unit.number * bands;
    unit.any = unit.number < u.units;
    unit.mine = false;
    if (unit.any && u.pairs != nullptr) {
      unit.image = unit.out = u.first_image + unit.number;
      const std::int64_t model = u.pairs[unit.image];
      unit.mine = model >= 0 && model < u.n_models && (u.bank.model(static_cast<int>(model)).has_head != 0) == heads;
      unit.model = static_cast<std::int32_t>(model);
    } else if (unit.any) {
      const std::uint32_t image = unit.number / static_cast<std::uint32_t>(u.count);
      unit.image = u.first_image + image;
      unit.model = u.order[unit.number - image * static_cast<std::uint32_t>(u.count)];
      unit.out = unit.image * u.n_models + unit.model;
      unit.mine = true;
    }
  }
  __syncthreads();
  return unit;
}

// Prepares images first_image .. first_image + batch - 1.
struct ImagesTask {
  BankRef bank;
  ImagesRef images;
  std::int64_t first_image, batch;
  std::int32_t planes;
  std::uint32_t* prepared;
};

struct ForwardTask {
  UnitsRef units;
  float* responses;
  std::int32_t bands;       // pieces of an image; above 1 every unit has its own area
  std::uint32_t* arrivals;  // [units] zeros, if bands > 1
};

struct GradientTask {
  UnitsRef units;
  const float* cotangent;
  float* responses;
  float* grad;                // shaped as the images; without pairs [units of this round][height, width, 3]
  std::int32_t to_images;     // whether `grad` is shaped as the images
  std::int32_t rings_shared;  // whether the rings of the backward pass lie in shared memory
};

// Sums gradients over models: grad[image] = sum over n of parts[image, n], in the order of the models, for the images
// of one round. Models whose cotangent is 0 add nothing.
struct SumTask {
  const float* head_parts;   // [batch][heads] gradients [height, width, 3]
  const float* plain_parts;  // [batch][plains]
  const std::int32_t* slot;  // [n_models]: position among the heads, or -1 - position among the others
  const float* cotangent;    // [all images, n_models]
  float* grad;
  ImagesRef images;
  std::int64_t batch, first_image;
  std::int32_t n_models, heads, plains;
};

// Where things lie in the area of a block of the gradient kernel, for a model with a head; bytes.
struct GradientArea {
  std::int64_t mask1, mask2;  // of the first two maps
  std::int64_t map, rest;     // if they do not fit in shared memory
  std::int64_t grad2, rings, bytes;
};

__host__ __device__ inline GradientArea gradient_area(const ModelRecord& model) {
  const HeadRecord& head = model.head;
  const std::int64_t pixels = static_cast<std::int64_t>(model.height) * model.width;
  const std::int64_t map = aligned(4 * out_floats(model.layers[kAfterHead - 1]));
  GradientArea a;
  a.mask1 = 0;
  a.mask2 = aligned(pixels * head.first.n_tiles);
  a.map = a.mask2 + aligned(pixels / 4 * head.mix1.n_tiles);
  a.rest = a.map + map;
  a.grad2 = a.rest + aligned(4 * model.rest.gradient_floats);
  a.rings = a.grad2 + map;
  a.bytes = a.rings + BackShape::kRingBytes;
  return a;
}

// For models with a head in either precision; for all others.
enum class Variant { fast, exact, plain };

// Blocks that fit on a multiprocessor of the current device with this much shared memory each.
Status forward_blocks(Variant variant, int shared_bytes, int* blocks);
Status gradient_blocks(Variant variant, int shared_bytes, int* blocks);

Status launch_forward(Variant variant, const ForwardTask& task, int grid, cudaStream_t stream);
Status launch_gradient(Variant variant, const GradientTask& task, int grid, cudaStream_t stream);
Status launch_images(const ImagesTask& task, int grid, cudaStream_t stream);
Status launch_sum(const SumTask& task, int grid, cudaStream_t stream);

}  // namespace cortexloop::cuda
