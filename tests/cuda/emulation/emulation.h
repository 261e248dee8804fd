// Test-only emulation of CUDA: a C++ compiler builds the .cu files against this header, and the kernels run on the CPU.
//
// Every thread of a block is a fiber. Nothing here is fast or parallel: it checks what a kernel computes, that barriers
// and warp instructions are reached by everyone, that shared memory is not overrun, and, by running the same launch with
// different schedules, that the answer does not depend on who comes first, nor on what shared memory held before. A
// misuse is reported as a failed launch whose text says what happened where. What it cannot show: speed, register use,
// the summation order inside a tensor core, the memory model.
//
// Schedule 0 runs blocks, warps and lanes in order; 1 in reverse; 2 and more take turns at random, with that seed: warps
// at each of their collectives, and three blocks in flight at each barrier. The garbage in shared memory differs too.
//
// Differences to know: mma_16816 and mma_1688 add products in ascending k, one float rounding each (hardware adds groups of
// products with truncation); __shfl_sync also orders shared memory here, on hardware only __syncwarp does.
#pragma once

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <utility>

#include "emulated_half.h"
#include "emulated_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition) ((void)0)

#define CORTEXLOOP_SHARED(name) unsigned char* const name = ::cortexloop::emulation::dynamic_shared()

extern thread_local uint3 threadIdx;
extern thread_local uint3 blockIdx;
extern uint3 blockDim;
extern uint3 gridDim;
constexpr int warpSize = 32;

namespace cortexloop::emulation {

// Where a collective was called; lanes of a warp must agree on it for instructions that are ".aligned" in PTX.
struct Site {
  const char* file;
  int line;
};
// The last parameters of every collective: nobody passes them, so they are the caller's.
#define CORTEXLOOP_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Kind {
  barrier,
  syncwarp,
  shuffle,
  shuffle_xor,
  shuffle_down,
  shuffle_up,
  ballot,
  reduce_max,
  reduce_min,
  reduce_add,
  mma_16816,
  mma_1688,
  ldmatrix_x4,
  ldmatrix_x4_trans,
  ldmatrix_x2,
};

struct MmaOperands {
  float* d;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

struct Mma1688Operands {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

struct LdmatrixOperands {
  std::uint32_t* r;
  const void* row;
};

struct ShuffleOperands {
  std::uint32_t value;  // in: this lane's; out: the other lane's
  int other;            // source lane, lane mask or distance
  int width;
};

enum class Vote { none, any, all, count };

struct BarrierOperands {
  Vote vote;
  int predicate;  // in: this thread's; out: the block's
};

// Waits until the lanes of `mask` (for a barrier: the block) have arrived, and does the operation for all of them.
void collective(Kind kind, std::uint32_t mask, void* operands, Site site);

unsigned char* dynamic_shared();
void fence();
void atomic(const void* address);
void load_constant(const void* address, std::size_t bytes, const void* from);
void copy_async(void* shared, const void* global, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int pending);

// Ends the launch with an error that gives the sentence, the block and the thread.
[[noreturn]] void misuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs `body` once per thread of every block, in the order of the schedule that is set (state.h).
cudaError_t run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

cudaError_t allow_shared(const void* kernel, int bytes);

template <class... P, std::size_t... I>
void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
  (void)args;
  kernel(*static_cast<std::remove_reference_t<P>*>(args[I])...);
}

template <class T>
T shuffle(Kind kind, std::uint32_t mask, T value, int other, int width, Site site) {
  static_assert(sizeof(T) % 4 == 0, "shuffles move 32 bits at a time");
  std::uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof value);
  for (std::uint32_t& word : words) {
    ShuffleOperands operands{word, other, width};
    collective(kind, mask, &operands, site);
    word = operands.value;
  }
  std::memcpy(&value, words, sizeof value);
  return value;
}

inline std::uint32_t reduce(Kind kind, std::uint32_t mask, std::uint32_t value, Site site) {
  collective(kind, mask, &value, site);
  return value;
}

inline int vote_barrier(Vote vote, int predicate, Site site) {
  BarrierOperands operands{vote, predicate};
  collective(Kind::barrier, ~0u, &operands, site);
  return operands.predicate;
}

}  // namespace cortexloop::emulation

// --- Barriers, shuffles, votes -----------------------------------------------------------------------------------

inline void __syncthreads(CORTEXLOOP_SITE) {
  cortexloop::emulation::vote_barrier(cortexloop::emulation::Vote::none, 0, {file, line});
}
inline int __syncthreads_or(int predicate, CORTEXLOOP_SITE) {
  return cortexloop::emulation::vote_barrier(cortexloop::emulation::Vote::any, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, CORTEXLOOP_SITE) {
  return cortexloop::emulation::vote_barrier(cortexloop::emulation::Vote::all, predicate, {file, line});
}
inline int __syncthreads_count(int predicate, CORTEXLOOP_SITE) {
  return cortexloop::emulation::vote_barrier(cortexloop::emulation::Vote::count, predicate, {file, line});
}
inline void __syncwarp(unsigned mask = ~0u, CORTEXLOOP_SITE) {
  cortexloop::emulation::collective(cortexloop::emulation::Kind::syncwarp, mask, nullptr, {file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CORTEXLOOP_SITE) {
  return cortexloop::emulation::shuffle(cortexloop::emulation::Kind::shuffle, mask, value, lane, width, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CORTEXLOOP_SITE) {
  return cortexloop::emulation::shuffle(cortexloop::emulation::Kind::shuffle_xor, mask, value, lanes, width,
                                        {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, CORTEXLOOP_SITE) {
  return cortexloop::emulation::shuffle(cortexloop::emulation::Kind::shuffle_down, mask, value,
                                        static_cast<int>(distance), width, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, CORTEXLOOP_SITE) {
  return cortexloop::emulation::shuffle(cortexloop::emulation::Kind::shuffle_up, mask, value,
                                        static_cast<int>(distance), width, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CORTEXLOOP_SITE) {
  return cortexloop::emulation::reduce(cortexloop::emulation::Kind::ballot, mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, CORTEXLOOP_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CORTEXLOOP_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, CORTEXLOOP_SITE) {
  return cortexloop::emulation::reduce(cortexloop::emulation::Kind::reduce_max, mask, value, {file, line});
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, CORTEXLOOP_SITE) {
  return cortexloop::emulation::reduce(cortexloop::emulation::Kind::reduce_min, mask, value, {file, line});
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, CORTEXLOOP_SITE) {
  return cortexloop::emulation::reduce(cortexloop::emulation::Kind::reduce_add, mask, value, {file, line});
}

// --- Memory --------------------------------------------------------------------------------------------------------

inline void __threadfence() { cortexloop::emulation::fence(); }
inline void __threadfence_block() {}

// Not inlined, so that a build with checks (races.h) does not see what they load and store.
#define CORTEXLOOP_UNCHECKED __attribute__((noinline, no_sanitize("thread")))

// Hardware may answer __ldg from a cache that does not see what the launch has stored.
#if defined(__SANITIZE_THREAD__)
template <class T>
CORTEXLOOP_UNCHECKED T __ldg(const T* pointer) {
  cortexloop::emulation::load_constant(pointer, sizeof(T), __builtin_return_address(0));
  return *pointer;
}
#else
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
#endif

template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
template <class T>
CORTEXLOOP_UNCHECKED T atomicAdd(T* address, T value) {
  cortexloop::emulation::atomic(address);
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
CORTEXLOOP_UNCHECKED T atomicMax(T* address, T value) {
  cortexloop::emulation::atomic(address);
  const T before = *address;
  *address = before < value ? value : before;
  return before;
}
template <class T>
CORTEXLOOP_UNCHECKED T atomicMin(T* address, T value) {
  cortexloop::emulation::atomic(address);
  const T before = *address;
  *address = value < before ? value : before;
  return before;
}
template <class T>
CORTEXLOOP_UNCHECKED T atomicExch(T* address, T value) {
  cortexloop::emulation::atomic(address);
  const T before = *address;
  *address = value;
  return before;
}
template <class T>
CORTEXLOOP_UNCHECKED T atomicCAS(T* address, T compare, T value) {
  cortexloop::emulation::atomic(address);
  const T before = *address;
  if (before == compare) *address = value;
  return before;
}

// --- Arithmetic ------------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return cortexloop::emulation::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return cortexloop::emulation::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return cortexloop::emulation::bits_as<float>(x); }
inline float __int_as_float(int x) { return cortexloop::emulation::bits_as<float>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
unsigned __byte_perm(unsigned x, unsigned y, unsigned selector);

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// --- PTX instructions, as in csrc/cuda/device.h -------------------------------------------------------------------

namespace cortexloop::cuda {

inline float relu(float x) { return x <= 0.0f ? 0.0f : x; }
inline __half2 relu_to_halves(float x, float y) { return __floats2half2_rn(relu(x), relu(y)); }

inline int thread_index() { return static_cast<int>(threadIdx.x); }

inline void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, CORTEXLOOP_SITE) {
  emulation::MmaOperands operands{d, a, {b0, b1}};
  emulation::collective(emulation::Kind::mma_16816, ~0u, &operands, {file, line});
}
inline void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], CORTEXLOOP_SITE) {
  mma_16816(d, a, b[0], b[1], file, line);
}
inline void mma_1688(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], CORTEXLOOP_SITE) {
  emulation::Mma1688Operands operands{d, a, b};
  emulation::collective(emulation::Kind::mma_1688, ~0u, &operands, {file, line});
}
inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row, CORTEXLOOP_SITE) {
  emulation::LdmatrixOperands operands{r, shared_row};
  emulation::collective(emulation::Kind::ldmatrix_x4, ~0u, &operands, {file, line});
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row, CORTEXLOOP_SITE) {
  emulation::LdmatrixOperands operands{r, shared_row};
  emulation::collective(emulation::Kind::ldmatrix_x4_trans, ~0u, &operands, {file, line});
}
inline void ldmatrix_x2(std::uint32_t (&r)[2], const void* shared_row, CORTEXLOOP_SITE) {
  emulation::LdmatrixOperands operands{r, shared_row};
  emulation::collective(emulation::Kind::ldmatrix_x2, ~0u, &operands, {file, line});
}
inline void copy_async_16(void* shared, const void* global, int valid = 16) {
  emulation::copy_async(shared, global, 16, valid);
}
inline void copy_async_4(void* shared, const void* global, int valid = 4) {
  emulation::copy_async(shared, global, 4, valid);
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulation::copy_async_wait(kPending);
}

}  // namespace cortexloop::cuda

// --- Launches --------------------------------------------------------------------------------------------------------

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** args, std::size_t shared_bytes,
                             cudaStream_t) {
  return cortexloop::emulation::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [=] {
    cortexloop::emulation::call(kernel, args, std::index_sequence_for<P...>{});
  });
}
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return cortexloop::emulation::allow_shared(reinterpret_cast<const void*>(kernel), value);
}
template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int, std::size_t) {
  *blocks = 1;
  return cudaSuccess;
}
