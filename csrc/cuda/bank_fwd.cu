// Responses of a bank. Blocks draw units until none is left; a unit runs from its image to its response in one block.
//
// Models of the published form: the head (head.h) streams through shared memory and leaves the third map, 28 x 28 x 3 for
// the median model, which stays in shared memory where it fits; the layers behind it (layers.h) take over the head's
// place. Where units are few, an image is cut into bands and the block that finishes a unit's last band goes on alone.
// Any other model runs one layer at a time with its maps in device memory.
#include "head.h"
#include "launch.h"
#include "layers.h"
#include "tasks.h"

namespace cortexloop::cuda {
namespace {

template <class Numbers>
__global__ __launch_bounds__(Numbers::kThreads, Numbers::kBlocks) void bank_fwd_kernel(ForwardTask task) {
  CORTEXLOOP_SHARED(shared);
  __shared__ float sums[kMaxWarps];
  __shared__ std::uint32_t arrived;
  __shared__ HeadJob job;
  const UnitsRef& u = task.units;
  for (;;) {
    const Unit& unit = draw(u, true, static_cast<std::uint32_t>(task.bands));
    if (!unit.any) break;
    if (!unit.mine) continue;
    const ModelRecord& model = u.bank.model(unit.model);
    if (threadIdx.x == 0) {
      const LayerRecord& third = model.layers[kAfterHead - 1];
      job.image = prepared_image(u, unit.image);
      job.planes = u.planes;
      job.begin = static_cast<int>(third.out_h * unit.band) / task.bands;
      job.end = static_cast<int>(third.out_h * (unit.band + 1)) / task.bands;
      constexpr int head_bytes = HeadShape<Numbers>::kBytes;
      const bool stays = task.bands == 1 && head_bytes + aligned(4 * out_floats(third)) <= u.shared_bytes;
      job.map =
          reinterpret_cast<float*>(stays ? shared + head_bytes : area_of(u, task.bands > 1 ? unit.number : blockIdx.x));
    }
    __syncthreads();
    run_head<Numbers, false>(u.bank, model, u.images, shared, job);

    // The layers behind take the head's place in shared memory, or else the area behind the map.
    const std::int64_t map_floats = out_floats(model.layers[kAfterHead - 1]), map_bytes = aligned(4 * map_floats);
    const std::int64_t rest_bytes = 4 * model.rest.floats;
    unsigned char* area = area_of(u, task.bands > 1 ? unit.number : blockIdx.x) + map_bytes;
    const float* map = job.map;
    unsigned char* rest = rest_bytes <= HeadShape<Numbers>::kBytes ? shared : area;
    if (task.bands > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) arrived = atomicAdd(task.arrivals + unit.number, 1u);
      __syncthreads();
      if (static_cast<std::int32_t>(arrived) + 1 < task.bands) continue;
      // The rows of other blocks are in the second-level cache; the first may hold older bytes of the same lines.
      __threadfence();
      const bool fits = map_bytes + rest_bytes <= u.shared_bytes;
      float* whole = reinterpret_cast<float*>(fits ? shared : area);
      for (int i = static_cast<int>(threadIdx.x); i < map_floats; i += Numbers::kThreads) whole[i] = __ldcg(map + i);
      __syncthreads();
      map = whole;
      rest = reinterpret_cast<unsigned char*>(whole) + map_bytes;
    }
    const float* last = rest_forward(u.bank, model, map, reinterpret_cast<float*>(rest));
    const float response = read_out(u.bank, model, last, sums);
    if (threadIdx.x == 0) task.responses[unit.out] = response;
  }
}

__global__ __launch_bounds__(kPlainThreads, 2) void bank_plain_fwd_kernel(ForwardTask task) {
  __shared__ float sums[kMaxWarps];
  const UnitsRef& u = task.units;
  for (;;) {
    const Unit& unit = draw(u, false);
    if (!unit.any) break;
    if (!unit.mine) continue;
    const ModelRecord& model = u.bank.model(unit.model);
    float* first = reinterpret_cast<float*>(area_of(u, blockIdx.x));
    full_forward(u.bank, model.layers[0], u.images, unit.image, u.bank.header().mean, first);
    const float* last = rest_forward(u.bank, model, first, first + out_floats(model.layers[0]));
    const float response = read_out(u.bank, model, last, sums);
    if (threadIdx.x == 0) task.responses[unit.out] = response;
  }
}

using Kernel = void (*)(ForwardTask);

struct Choice {
  const char* name;
  Kernel kernel;
  int threads;
};

Choice choose(Variant variant) {
  switch (variant) {
    case Variant::fast: return {"bank_fwd_kernel<Fast>", bank_fwd_kernel<Fast>, Fast::kThreads};
    case Variant::exact: return {"bank_fwd_kernel<Exact>", bank_fwd_kernel<Exact>, Exact::kThreads};
    default: return {"bank_plain_fwd_kernel", bank_plain_fwd_kernel, kPlainThreads};
  }
}

}  // namespace

Status launch_forward(Variant variant, const ForwardTask& task, int grid, cudaStream_t stream) {
  const Choice c = choose(variant);
  return launch(c.name, c.kernel, dim3(static_cast<unsigned>(grid)), c.threads,
                static_cast<std::size_t>(task.units.shared_bytes), stream, task);
}

Status forward_blocks(Variant variant, int shared_bytes, int* blocks) {
  const Choice c = choose(variant);
  return resident_blocks(c.name, c.kernel, c.threads, static_cast<std::size_t>(shared_bytes), blocks);
}

}  // namespace cortexloop::cuda
