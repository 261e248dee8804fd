// Host side of a kernel: launches without <<<>>> (so that .cu files are also plain C++), CUDA's errors as a Status.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "cortexloop/status.h"
#include "device.h"

namespace cortexloop::cuda {

constexpr std::size_t kSharedWithoutOptIn = 48 * 1024;

// `what` names the kernel or the call, as in "bank_fwd_kernel". An error that CUDA has stored is taken out, so that it
// does not surface in somebody else's next call.
inline Status check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::ok;
  cudaGetLastError();
  const Status status = error == cudaErrorMemoryAllocation ? Status::out_of_memory : Status::device_error;
  return fail(status, "CUDA: %s failed: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

// Makes `device` current for its lifetime; `status()` says whether that worked.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = check(cudaGetDevice(&before_), "cudaGetDevice");
    if (status_ != Status::ok || before_ == device) return;
    status_ = check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = status_ == Status::ok;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  Status status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  Status status_ = Status::ok;
};

// Lets `kernel` use that much dynamic shared memory.
template <class... P>
Status allow_shared(const char* name, void (*kernel)(P...), std::size_t shared_bytes) {
  if (shared_bytes <= kSharedWithoutOptIn) return Status::ok;
  return check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
}

// Blocks of `kernel` that run at a time on one multiprocessor of the current device.
template <class... P>
Status resident_blocks(const char* name, void (*kernel)(P...), int threads, std::size_t shared_bytes, int* blocks) {
  const Status status = allow_shared(name, kernel, shared_bytes);
  if (status != Status::ok) return status;
  return check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes), name);
}

// Starts `kernel` on the current device: allocates nothing, does not wait, can be captured in a graph.
template <class... P, class... A>
Status launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, std::size_t shared_bytes,
              cudaStream_t stream, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  const Status status = allow_shared(name, kernel, shared_bytes);
  if (status != Status::ok) return status;
  std::tuple<P...> values(args...);  // converted to the parameters' own types
  return std::apply(
      [&](P&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
        return check(
            cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), pointers, shared_bytes, stream), name);
      },
      values);
}

}  // namespace cortexloop::cuda
