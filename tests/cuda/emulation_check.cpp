// Kernels that check the emulation itself, called by test_emulation.py through ctypes. Each returns the sentence of a
// failed launch, or "".
#include <cstdint>

#include "launch.h"

using namespace cortexloop;
using namespace cortexloop::cuda;

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

__global__ void product_kernel(const __half* a, const __half* b, const float* c, float* d) {
  // Positions as the tables of PTX's m16n8k16 give them, element by element.
  const int group = static_cast<int>(threadIdx.x) >> 2, in_group = static_cast<int>(threadIdx.x) % 4;
  __half a_elements[8], b_elements[4];
  float accumulators[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    a_elements[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    b_elements[i] = b[row * 8 + group];
  }
  for (int i = 0; i < 4; ++i) accumulators[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  std::uint32_t a_registers[4], b_registers[2];
  std::memcpy(a_registers, a_elements, sizeof a_registers);
  std::memcpy(b_registers, b_elements, sizeof b_registers);
  mma_16816(accumulators, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = accumulators[i];
}

// The same product with operands from shared memory: A by rows, B once by columns and once, transposed, by rows.
__global__ void loaded_product_kernel(const __half* a, const __half* b, const float* c, float* d, int transposed) {
  CORTEXLOOP_SHARED(shared);
  auto* a_shared = reinterpret_cast<__half*>(shared);
  __half* b_shared = a_shared + 16 * 16;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) a_shared[i] = a[i];
  for (int i = lane; i < 128; i += 32) b_shared[transposed ? i : i % 8 * 16 + i / 8] = b[i];
  __syncwarp();
  std::uint32_t a_registers[4], b_registers[2];
  ldmatrix_x4(a_registers, a_shared + lane % 16 * 16 + lane / 16 * 8);
  if (transposed) {
    std::uint32_t both[4];
    ldmatrix_x4_trans(both, b_shared + lane % 16 * 8);
    b_registers[0] = both[0];
    b_registers[1] = both[1];
  } else {
    ldmatrix_x2(b_registers, b_shared + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  float accumulators[4];
  for (int i = 0; i < 4; ++i) accumulators[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  mma_16816(accumulators, a_registers, b_registers[0], b_registers[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = accumulators[i];
}

// One product of tf32 numbers, positions as the tables of PTX's m16n8k8 give them.
__global__ void tf32_kernel(const float* a, const float* b, const float* c, float* d) {
  const int group = static_cast<int>(threadIdx.x) >> 2, in_group = static_cast<int>(threadIdx.x) % 4;
  std::uint32_t a_registers[4], b_registers[2];
  float accumulators[4];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? group : group + 8, column = i < 2 ? in_group : in_group + 4;
    a_registers[i] = __float_as_uint(a[row * 8 + column]);
    accumulators[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  }
  for (int i = 0; i < 2; ++i) b_registers[i] = __float_as_uint(b[(in_group + 4 * i) * 8 + group]);
  mma_1688(accumulators, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = accumulators[i];
}

// Two-dimensional grid and block; out[block, thread] = the sum over the block of (thread + 1), by shuffles and shared
// memory, plus the position of the thread in its block.
__global__ void sums_kernel(float* out) {
  __shared__ float partial[32];
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  float sum = static_cast<float>(thread + 1);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(kAllLanes, sum, distance);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x * blockDim.y / 32; ++i) total += partial[i];
  const unsigned n_threads = blockDim.x * blockDim.y;
  out[(blockIdx.y * gridDim.x + blockIdx.x) * n_threads + thread] = total + static_cast<float>(thread);
}

__global__ void lanes_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  out[lane] = __shfl_sync(kAllLanes, lane * 10, 5);
  out[32 + lane] = __shfl_xor_sync(kAllLanes, lane, 3);
  out[64 + lane] = __ballot_sync(kAllLanes, lane % 3 == 0);
  out[96 + lane] = __reduce_max_sync(kAllLanes, lane ^ 21u);
  out[128 + lane] = __shfl_sync(kAllLanes, lane, 1, 8);
  out[160 + lane] = lane < 8 ? __reduce_add_sync(0xffu, lane) : __reduce_add_sync(0xffffff00u, lane);
  out[192 + lane] =
      static_cast<unsigned>(__any_sync(kAllLanes, lane == 40)) + 2 * (__all_sync(kAllLanes, lane < 32) != 0);
  out[224 + lane] = static_cast<unsigned>(__syncthreads_count(lane < 7));
  out[256 + lane] = static_cast<unsigned>(__shfl_up_sync(kAllLanes, static_cast<int>(lane), 2));
  out[288 + lane] = static_cast<unsigned>(1e-9 * __shfl_xor_sync(kAllLanes, 1e9 * (lane + 1), 1) + 0.5);
}

enum Fault {
  kPartialBarrier,
  kPartialWarp,
  kTwoPlaces,
  kDifferentKinds,
  kMisalignedRow,
  kRowOutside,
  kOverrunByOne,
  kOverrunByPages,
  kUnderrun,
  kNullPointer,
  kOutsideMask,
  kStack,
  kNotTf32,
  kNoFault
};

int deep(int depth, volatile int* sink) {
  volatile int local[1024];
  local[depth % 1024] = depth;
  *sink = local[depth % 1024];
  return depth <= 0 ? 0 : deep(depth - 1, sink) + local[depth % 1024];
}

__global__ void faulty_kernel(int fault, int* out) {
  CORTEXLOOP_SHARED(shared);
  const auto thread = static_cast<int>(threadIdx.x);
  std::uint32_t r[4] = {}, b[2] = {};
  float d[4] = {};
  shared[thread] = 0;
  switch (fault) {
    case kPartialBarrier:
      if (thread < 40) __syncthreads();
      break;
    case kPartialWarp:
      if (thread % 32 != 7) mma_16816(d, r, b);
      break;
    case kTwoPlaces:
      if (thread % 2) {
        mma_16816(d, r, b);
      } else {
        mma_16816(d, r, b[0], b[1]);
      }
      break;
    case kDifferentKinds:
      if (thread % 2) {
        __syncwarp();
      } else {
        out[0] = __shfl_sync(kAllLanes, 1, 0);
      }
      break;
    case kMisalignedRow: ldmatrix_x4(r, shared + thread * 8); break;
    case kRowOutside: ldmatrix_x4(r, shared + 4096 - 16 * 63 + thread * 16); break;
    case kOverrunByOne: shared[3999 + (thread == 63)] = 1; break;
    case kOverrunByPages: shared[thread * 200] = 1; break;
    case kUnderrun: *(shared - 1) = 1; break;
    case kNullPointer: *static_cast<volatile int*>(nullptr) = 1; break;
    case kOutsideMask:
      if (thread < 2) out[0] = __shfl_sync(3u, thread, 5);
      break;
    case kStack: deep(1000, out); break;
    case kNotTf32:
      r[0] = thread == 9 ? __float_as_uint(1.0f + 0x1p-11f) : 0u;
      mma_1688(d, r, b);
      break;
    default: out[0] = 42;
  }
}

enum Race { kDynamic, kStatic, kWithinWarp, kBetweenBlocks, kUnaligned, kConstant, kCopy, kOrdered };

// Wrong on purpose, all but the last way: threads read what others write, and nothing orders them.
__global__ void race_kernel(int way, int* out) {
  CORTEXLOOP_SHARED(shared);
  __shared__ int statics[128];
  auto* values = way == kStatic ? statics : reinterpret_cast<int*>(shared);
  const unsigned thread = threadIdx.x;
  int* const own = out + 2 + blockIdx.x * 200 + thread;
  values[thread] = 1;
  __syncthreads();
  switch (way) {
    case kDynamic:
    case kStatic:
      values[thread] = 2;
      *own = values[(thread + 32) % blockDim.x];
      break;
    case kWithinWarp:
      values[thread] = 2;
      *own = values[thread ^ 1];
      break;
    case kBetweenBlocks:
      if (thread == 0) out[0] = static_cast<int>(blockIdx.x);
      break;
    case kCopy:
      copy_async_16(values + 4 * (thread % 32), out + 208 - reinterpret_cast<std::uintptr_t>(out) / 4 % 4);
      __syncthreads();
      *own = values[thread];
      break;
    case kConstant:
      *own = 3;
      __syncthreads();
      out[200] = __ldg(own);
      break;
    case kUnaligned: *own = static_cast<int>(reinterpret_cast<const uint2*>(shared + 4)->y); break;
    default:
      values[thread] = 2;
      __syncwarp();
      *own = values[thread ^ 1];
      // The last block to arrive reads what the other one wrote.
      if (thread == 0) {
        out[150 + blockIdx.x] = 5;
        __threadfence();
        if (atomicAdd(out, 1) == 1) {
          __threadfence();
          out[160] = out[150] + out[151];
        }
      }
  }
}

__global__ void unwritten_kernel(float* out) {
  CORTEXLOOP_SHARED(shared);
  *out = reinterpret_cast<const float*>(shared)[3] > 0.0f;
}

// Blocks draw units until none is left and note who drew which; a static variable carries the unit across a barrier.
__global__ void draw_kernel(unsigned* next, int* owner, int units) {
  __shared__ unsigned drawn;
  for (;;) {
    if (threadIdx.x == 0) drawn = atomicAdd(next, 1u);
    __syncthreads();
    const auto unit = static_cast<int>(drawn);
    __syncthreads();
    if (unit >= units) return;
    if (threadIdx.x == 33) owner[unit] = static_cast<int>(blockIdx.x);
  }
}

// Copies asynchronously; reads before and after the wait.
__global__ void copies_kernel(const int* in, int* out) {
  CORTEXLOOP_SHARED(shared);
  auto* values = reinterpret_cast<int*>(shared);
  for (int i = 0; i < 8; ++i) values[i] = -1;
  copy_async_16(values, in);
  copy_async_commit();
  copy_async_16(values + 4, in + 4, 8);
  copy_async_commit();
  out[0] = values[0];
  copy_async_wait<1>();
  out[1] = values[0];
  out[2] = values[4];
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[3 + i] = values[4 + i];
  copy_async_4(values + 1, in + 6);
  copy_async_4(values + 2, in + 7, 0);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[7 + i] = values[i];
}

const char* sentence(Status status) { return status == Status::ok ? "" : last_error(); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* product(const std::uint16_t* a, const std::uint16_t* b, const float* c, float* d, int way) {
  const auto* a_halves = reinterpret_cast<const __half*>(a);
  const auto* b_halves = reinterpret_cast<const __half*>(b);
  if (way == 0) return sentence(launch("product_kernel", product_kernel, 1, 32, 0, nullptr, a_halves, b_halves, c, d));
  return sentence(
      launch("loaded_product_kernel", loaded_product_kernel, 1, 32, 768, nullptr, a_halves, b_halves, c, d, way - 1));
}
EXPORT const char* tf32_product(const float* a, const float* b, const float* c, float* d) {
  return sentence(launch("tf32_kernel", tf32_kernel, 1, 32, 0, nullptr, a, b, c, d));
}
EXPORT const char* sums(float* out, int grid_x, int grid_y, int block_x, int block_y) {
  // launch() takes a number of threads; a two-dimensional block goes directly.
  void* arguments[] = {&out};
  const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
  const dim3 block(static_cast<unsigned>(block_x), static_cast<unsigned>(block_y));
  return sentence(check(cudaLaunchKernel(sums_kernel, grid, block, arguments, 0, nullptr), "sums_kernel"));
}
EXPORT const char* lanes(unsigned* out) {
  return sentence(launch("lanes_kernel", lanes_kernel, 1, 32, 0, nullptr, out));
}
EXPORT const char* faulty(int fault, int* out) {
  const std::size_t bytes = fault == kOverrunByOne ? 4000 : 4096;
  return sentence(launch("faulty_kernel", faulty_kernel, 2, 64, bytes, nullptr, fault, out));
}
EXPORT const char* race(int way, int* out) {
  const unsigned grid = way == kBetweenBlocks || way == kOrdered ? 2 : 1;
  return sentence(launch("race_kernel", race_kernel, grid, 128, 512, nullptr, way, out));
}
EXPORT const char* draw(unsigned* next, int* owner, int units) {
  return sentence(launch("draw_kernel", draw_kernel, 4, 64, 0, nullptr, next, owner, units));
}
EXPORT const char* unwritten(float* out) {
  return sentence(launch("unwritten_kernel", unwritten_kernel, 1, 1, 64, nullptr, out));
}
EXPORT const char* copies(const int* in, int* out) {
  return sentence(launch("copies_kernel", copies_kernel, 1, 1, 32, nullptr, in, out));
}
EXPORT const char* sized(int grid, int threads, long shared_bytes, int* out) {
  return sentence(launch("faulty_kernel", faulty_kernel, static_cast<unsigned>(grid), threads,
                         static_cast<std::size_t>(shared_bytes), nullptr, static_cast<int>(kNoFault), out));
}
EXPORT const char* on_device(int device) {
  const DeviceGuard guard(device);
  return sentence(guard.status());
}

EXPORT void to_halves(const float* x, std::uint16_t* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = __half_as_ushort(__float2half_rn(x[i]));
}
EXPORT void from_halves(const std::uint16_t* x, float* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = __half2float(__ushort_as_half(x[i]));
}
EXPORT void arithmetic(int what, const std::uint16_t* a, const std::uint16_t* b, const std::uint16_t* c,
                       std::uint16_t* out, long n) {
  for (long i = 0; i < n; ++i) {
    const __half x = __ushort_as_half(a[i]), y = __ushort_as_half(b[i]), z = __ushort_as_half(c[i]);
    const __half2 xx = __halves2half2(x, y), yy = __halves2half2(y, x), zz = __half2half2(z);
    const __half result[] = {__low2half(__hadd2(xx, yy)),     __low2half(__hsub2(xx, yy)), __hmul(x, y),
                             __low2half(__hfma2(xx, yy, zz)), __low2half(__hmax2(xx, yy)), __hmin(x, y)};
    out[i] = __half_as_ushort(result[what]);
  }
}
EXPORT unsigned permuted(unsigned x, unsigned y, unsigned selector) { return __byte_perm(x, y, selector); }
