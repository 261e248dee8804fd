// Prepares images for heads, once per call and image, for all models of a bank.
#include "images.h"

#include "launch.h"
#include "numbers.h"
#include "tasks.h"

namespace cortexloop::cuda {
namespace {

__global__ __launch_bounds__(kPlainThreads) void bank_images_kernel(ImagesTask task) {
  const ImagesRef& images = task.images;
  const float* mean = task.bank.header().mean;
  const std::int64_t rows = images.height + 4, words = rows * (kPreparedRow / 2);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kPlainThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x; i < task.batch * words;
       i += step) {
    const std::int64_t image = i / words, line = (i - image * words) / (kPreparedRow / 2);
    const int word = static_cast<int>(i % (kPreparedRow / 2)), y = static_cast<int>(line) - 2;
    float v[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const int at = 2 * word + j, column = at / 3, c = at - 3 * column, x = column - 2;
      const bool inside = y >= 0 && y < images.height && x >= 0 && x < images.width;
      const float centre = images.is_u8 ? rintf(mean[c]) : 0.0f;
      v[j] = inside ? images.raw(task.first_image + image, y, x, c) - centre : (images.is_u8 ? mean[c] - centre : 0.0f);
    }
    std::uint32_t* here = task.prepared + (image * task.planes * rows + line) * kPreparedRow + word;
    const __half2 even = __floats2half2_rn(v[0], v[1]), odd = __floats2half2_rn(v[1], v[2]);
    here[0] = bits(even);
    here[kPreparedRow / 2] = bits(odd);
    if (task.planes == 2) {
      const float2 e = __half22float2(even), o = __half22float2(odd);
      here += rows * kPreparedRow;
      here[0] = bits(__floats2half2_rn(v[0] - e.x, v[1] - e.y));
      here[kPreparedRow / 2] = bits(__floats2half2_rn(v[1] - o.x, v[2] - o.y));
    }
  }
}

}  // namespace

Status launch_images(const ImagesTask& task, int grid, cudaStream_t stream) {
  return launch("bank_images_kernel", bank_images_kernel, dim3(static_cast<unsigned>(grid)), kPlainThreads, 0, stream,
                task);
}

}  // namespace cortexloop::cuda
