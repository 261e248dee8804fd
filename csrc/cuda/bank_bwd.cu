// Input gradients of a bank, and responses on the way. One unit is one (image, model), as in bank_fwd.cu.
//
// A unit runs forward in the exact precision and leaves one bit per ReLU of the first two maps, about 100 KB that stay in
// the second-level cache; then backwards (layers.h, head_back.h). Without pairs every unit writes its own gradient, and a
// second kernel adds those of an image in the order of the models, so that the sum depends on nothing else.
#include "head_back.h"
#include "launch.h"
#include "layers.h"
#include "tasks.h"

namespace cortexloop::cuda {
namespace {

// Where one unit's gradient goes.
struct Target {
  float* grad;
  std::int64_t stride_y, stride_x, stride_c;
};

__device__ __forceinline__ Target target_of(const GradientTask& task, const Unit& unit) {
  const ImagesRef& images = task.units.images;
  if (task.to_images != 0) {
    return {task.grad + unit.image * images.stride_n, images.stride_y, images.stride_x, images.stride_c};
  }
  const std::int64_t size = static_cast<std::int64_t>(images.height) * images.width * 3;
  return {task.grad + unit.number * size, images.width * 3, 3, 1};
}

// Models that are not asked for: their gradient is 0, whatever their maps hold.
__device__ __forceinline__ void write_zeros(const ImagesRef& images, const Target& target) {
  for (int i = static_cast<int>(threadIdx.x); i < images.height * images.width * 3; i += static_cast<int>(blockDim.x)) {
    const int pixel = i / 3, y = pixel / images.width;
    target
        .grad[y * target.stride_y + (pixel - y * images.width) * target.stride_x + (i - 3 * pixel) * target.stride_c] =
        0.0f;
  }
}

__global__ __launch_bounds__(Exact::kThreads, Exact::kBlocks) void bank_bwd_kernel(GradientTask task) {
  CORTEXLOOP_SHARED(shared);
  __shared__ float sums[kMaxWarps];
  __shared__ HeadJob job;
  __shared__ BackJob back;
  const UnitsRef& u = task.units;
  for (;;) {
    const Unit& unit = draw(u, true);
    if (!unit.any) break;
    if (!unit.mine) continue;
    {
      const ModelRecord& model = u.bank.model(unit.model);
      if (threadIdx.x == 0) {
        const GradientArea at = gradient_area(model);
        unsigned char* area = area_of(u, blockIdx.x);
        job.image = prepared_image(u, unit.image);
        job.planes = u.planes;
        job.begin = 0;
        job.end = model.height / 4;
        job.masks = back.masks = {area + at.mask1, area + at.mask2};
        const int map_bytes = static_cast<int>(aligned(4 * out_floats(model.layers[kAfterHead - 1])));
        const bool stays = HeadShape<Exact>::kBytes + map_bytes <= u.shared_bytes;
        job.map = reinterpret_cast<float*>(stays ? shared + u.shared_bytes - map_bytes : area + at.map);
      }
      __syncthreads();
      run_head<Exact, true>(u.bank, model, u.images, shared, job);
    }
    const ModelRecord& model = u.bank.model(unit.model);
    // `rest` takes the head's place if it leaves the map alone, else the area.
    const int map_bytes = static_cast<int>(aligned(4 * out_floats(model.layers[kAfterHead - 1])));
    const bool fits = 4 * model.rest.gradient_floats <= u.shared_bytes - map_bytes;
    float* rest = reinterpret_cast<float*>(fits ? shared : area_of(u, blockIdx.x) + gradient_area(model).rest);
    const float* last = rest_forward(u.bank, model, job.map, rest);
    const float response = read_out(u.bank, model, last, sums);
    if (threadIdx.x == 0 && task.responses != nullptr) task.responses[unit.out] = response;
    const float cotangent = task.cotangent[unit.out];
    if (cotangent == 0.0f) {
      if (task.to_images != 0) write_zeros(u.images, target_of(task, unit));
      continue;
    }
    const float* grad = rest_backward(u.bank, model, job.map, rest, cotangent);
    float* kept = reinterpret_cast<float*>(area_of(u, blockIdx.x) + gradient_area(model).grad2);
    float largest = 0.0f;
    const int total = static_cast<int>(out_floats(model.layers[kAfterHead - 1]));
    for (int i = static_cast<int>(threadIdx.x); i < total; i += Exact::kThreads) {
      kept[i] = grad[i];
      largest = fmaxf(largest, fabsf(grad[i]));
    }
    largest = block_reduce(largest, sums, [](float a, float b) { return fmaxf(a, b); });
    if (threadIdx.x == 0) {
      unsigned char* rings =
          task.rings_shared != 0 ? shared + BackShape::kBytes : area_of(u, blockIdx.x) + gradient_area(model).rings;
      back.grad2 = kept;
      back.scale1 = scale_for(largest * model.head.largest1);
      back.scale0 = scale_for(largest * model.head.largest0);
      back.ring2 = reinterpret_cast<float2*>(rings);
      back.ring1 = reinterpret_cast<float2*>(rings + 8 * BackShape::kRing2);
      const Target target = target_of(task, unit);
      back.grad = target.grad;
      back.stride_y = target.stride_y;
      back.stride_x = target.stride_x;
      back.stride_c = target.stride_c;
    }
    __syncthreads();
    head_backward(u.bank, model, u.images, shared, back);
  }
}

__global__ __launch_bounds__(kPlainThreads, 2) void bank_plain_bwd_kernel(GradientTask task) {
  __shared__ float sums[kMaxWarps];
  const UnitsRef& u = task.units;
  for (;;) {
    const Unit& unit = draw(u, false);
    if (!unit.any) break;
    if (!unit.mine) continue;
    const ModelRecord& model = u.bank.model(unit.model);
    const LayerRecord& layer = model.layers[0];
    float* first = reinterpret_cast<float*>(area_of(u, blockIdx.x));
    float* rest = first + out_floats(layer);
    full_forward(u.bank, layer, u.images, unit.image, u.bank.header().mean, first);
    const float* last = rest_forward(u.bank, model, first, rest);
    const float response = read_out(u.bank, model, last, sums);
    if (threadIdx.x == 0 && task.responses != nullptr) task.responses[unit.out] = response;
    const float cotangent = task.cotangent[unit.out];
    const Target target = target_of(task, unit);
    if (cotangent == 0.0f) {
      if (task.to_images != 0) write_zeros(u.images, target);
      continue;
    }
    const float* grad = rest_backward(u.bank, model, first, rest, cotangent);
    full_backward(u.bank, layer, grad, [&](int y, int x, int c, float value) {
      target.grad[y * target.stride_y + x * target.stride_x + c * target.stride_c] = value;
    });
  }
}

__global__ __launch_bounds__(kPlainThreads) void bank_sum_kernel(SumTask task) {
  const ImagesRef& images = task.images;
  const std::int64_t size = static_cast<std::int64_t>(images.height) * images.width * 3, total = task.batch * size;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kPlainThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x; i < total; i += step) {
    const std::int64_t image = i / size, at = i - image * size;
    const float* cotangent = task.cotangent + (task.first_image + image) * task.n_models;
    float sum = 0.0f;
    for (int n = 0; n < task.n_models; ++n) {
      if (cotangent[n] == 0.0f) continue;
      const int slot = task.slot[n];
      sum += slot >= 0 ? task.head_parts[(image * task.heads + slot) * size + at]
                       : task.plain_parts[(image * task.plains - 1 - slot) * size + at];
    }
    const int pixel = static_cast<int>(at / 3), c = static_cast<int>(at - 3 * static_cast<std::int64_t>(pixel));
    const int y = pixel / images.width;
    task.grad[images.offset(task.first_image + image, y, pixel - y * images.width, c)] = sum;
  }
}

}  // namespace

Status launch_gradient(Variant variant, const GradientTask& task, int grid, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(grid));
  const auto shared = static_cast<std::size_t>(task.units.shared_bytes);
  return variant == Variant::plain
             ? launch("bank_plain_bwd_kernel", bank_plain_bwd_kernel, blocks, kPlainThreads, shared, stream, task)
             : launch("bank_bwd_kernel", bank_bwd_kernel, blocks, Exact::kThreads, shared, stream, task);
}

Status gradient_blocks(Variant variant, int shared_bytes, int* blocks) {
  const auto shared = static_cast<std::size_t>(shared_bytes);
  return variant == Variant::plain
             ? resident_blocks("bank_plain_bwd_kernel", bank_plain_bwd_kernel, kPlainThreads, shared, blocks)
             : resident_blocks("bank_bwd_kernel", bank_bwd_kernel, Exact::kThreads, shared, blocks);
}

Status launch_sum(const SumTask& task, int grid, cudaStream_t stream) {
  return launch("bank_sum_kernel", bank_sum_kernel, dim3(static_cast<unsigned>(grid)), kPlainThreads, 0, stream, task);
}

}  // namespace cortexloop::cuda
