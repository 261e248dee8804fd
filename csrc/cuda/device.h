// What kernels include: CUDA's own headers, and PTX instructions as functions.
//
// The test-only emulation (tests/cuda/emulation) supplies the same names to a C++ compiler, so a kernel that keeps to
// these functions, and is launched through launch.h, runs on a CPU from the same source. A PTX instruction that is
// missing here is added in both places.
#pragma once

#if defined(CORTEXLOOP_EMULATION)
#include "emulation.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Declares `name`, the start of the dynamic shared memory of the block, aligned to 128 bytes.
#define CORTEXLOOP_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace cortexloop::cuda {

// threadIdx.x, read anew at every call. The compiler would keep threadIdx.x, and all that follows from it, in registers
// for the whole of a long kernel.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// max(x, 0), and NaN for NaN.
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers through the ReLU, NaN for NaN, rounded to halves: x in the lower half.
__device__ __forceinline__ __half2 relu_to_halves(float x, float y) {
  std::uint32_t both;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  return *reinterpret_cast<const __half2*>(&both);
}

// d += a * b for one warp: a is 16 x 16, b is 16 x 8, d is 16 x 8; all lanes of the warp together. With g = lane / 4 and
// t = lane % 4, each register of halves holding two neighbours, the lower index in the lower half:
//
//   a[0] = A[g][2t..]   a[1] = A[g + 8][2t..]   a[2] = A[g][2t + 8..]   a[3] = A[g + 8][2t + 8..]
//   b[0] = B[2t..][g]   b[1] = B[2t + 8..][g]
//   d[0], d[1] = D[g][2t], D[g][2t + 1]         d[2], d[3] = D[g + 8][2t], D[g + 8][2t + 1]
__device__ __forceinline__ void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                          std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  mma_16816(d, a, b[0], b[1]);
}

// d += a * b for one warp, of tf32 numbers: floats whose lower 13 bits are zero (what others mean is not said anywhere). a is
// 16 x 8, b is 8 x 8, d is 16 x 8. With g = lane / 4 and t = lane % 4:
//
//   a[0] = A[g][t]   a[1] = A[g + 8][t]   a[2] = A[g][t + 4]   a[3] = A[g + 8][t + 4]
//   b[0] = B[t][g]   b[1] = B[t + 4][g]   d as above
__device__ __forceinline__ void mma_1688(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane l gives the address of one row (16 bytes, aligned): row
// l % 8 of matrix l / 8. It gets, in r[m], the numbers [l / 4][2 (l % 4)] and [l / 4][2 (l % 4) + 1] of matrix m.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// The same matrices, each transposed: lane l gets [2 (l % 4)][l / 4] and [2 (l % 4) + 1][l / 4] of matrix m.
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// Two matrices: lanes 0 to 15 give the rows; the addresses of the others are not read.
__device__ __forceinline__ void ldmatrix_x2(std::uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// Starts a copy of 16 aligned bytes from global to shared memory; bytes from `valid` on (0 to 16) become zero.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}

// The same for 4 aligned bytes; `valid` is 0 or 4.
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, int valid = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}

// Closes the group of copies that this thread has started since the last call.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the kPending newest groups of this thread are unfinished. Other threads see the bytes only after a
// barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace cortexloop::cuda

#endif
