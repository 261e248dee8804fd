// Images in device memory, and as heads read them.
//
// A prepared image has rows -2 .. height + 1 and columns from -2 on, as halves, three colours to a pixel. Every row is there
// twice, the second copy one number further, so that every pair of neighbours lies in one aligned word. The padding is
// zero after recentring; levels are kept minus the *rounded* mean, which is exact, so their padding is what rounding the
// mean took away. In the exact mode, values that are not levels have a second plane with what rounding to halves left over.
#pragma once

#include "device.h"

namespace cortexloop::cuda {

constexpr int kPreparedRow = 352;  // words: two copies, for images up to kMaxWidth wide

// By value.
struct ImagesRef {
  const void* data;
  std::int32_t is_u8;
  std::int32_t height, width;
  std::int64_t stride_n, stride_y, stride_x, stride_c;  // in elements

  __device__ __forceinline__ std::int64_t offset(std::int64_t image, int y, int x, int c) const {
    return image * stride_n + y * stride_y + x * stride_x + c * stride_c;
  }
  // As given: a level, or a recentred value.
  __device__ __forceinline__ float raw(std::int64_t image, int y, int x, int c) const {
    const std::int64_t i = offset(image, y, x, c);
    return is_u8 ? static_cast<float>(static_cast<const std::uint8_t*>(data)[i]) : static_cast<const float*>(data)[i];
  }
  // The recentred value.
  __device__ __forceinline__ float value(std::int64_t image, int y, int x, int c, const float* mean) const {
    return raw(image, y, x, c) - (is_u8 ? mean[c] : 0.0f);
  }
};

__host__ __device__ inline std::int64_t prepared_bytes(int height, int planes) {
  return 4ll * planes * (height + 4) * kPreparedRow;
}

}  // namespace cortexloop::cuda
