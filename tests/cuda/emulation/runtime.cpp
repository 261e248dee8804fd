// The runtime API on one or more devices that exist in name only, and the settings behind it.
#include <cstdarg>
#include <cstdlib>
#include <map>

#include "state.h"

namespace cortexloop::emulation {

Settings settings;
std::string misused;

namespace {

cudaError_t last_error = cudaSuccess;
int current_device = 0;

long long* setting(const std::string& name) {
  static const std::map<std::string, long long*> by_name = {
      {"devices", &settings.devices},
      {"driver", &settings.driver},
      {"multiprocessors", &settings.multiprocessors},
      {"shared_memory", &settings.shared_memory},
      {"major", &settings.major},
      {"minor", &settings.minor},
      {"l2", &settings.l2},
      {"memory", &settings.memory},
      {"free_memory", &settings.free_memory},
      {"schedule", &settings.schedule},
      {"fail_launch", &settings.fail_launch},
      {"launches", &settings.launches},
      {"blocks", &settings.blocks},
      {"matrix_instructions", &settings.matrix_instructions},
  };
  const auto found = by_name.find(name);
  return found == by_name.end() ? nullptr : found->second;
}

}  // namespace

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

const char* name_of(Kind kind) {
  constexpr const char* names[] = {"__syncthreads",     "__syncwarp",        "__shfl_sync",   "__shfl_xor_sync",
                                   "__shfl_down_sync",  "__shfl_up_sync",    "__ballot_sync", "__reduce_max_sync",
                                   "__reduce_min_sync", "__reduce_add_sync", "mma_16816",     "mma_1688",
                                   "ldmatrix_x4",       "ldmatrix_x4_trans", "ldmatrix_x2"};
  return names[static_cast<int>(kind)];
}

}  // namespace cortexloop::emulation

using namespace cortexloop::emulation;

unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 0xfu;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7u))) & 0xffu;
    if (choice & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

// --- Runtime API -----------------------------------------------------------------------------------------------------

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorLaunchFailure: return misused.c_str();
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = static_cast<int>(settings.driver);
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings.driver == 0 ? 0 : static_cast<int>(settings.devices);
  if (settings.driver == 0) return failed(cudaErrorInsufficientDriver);
  return *count == 0 ? failed(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings.devices) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= settings.devices) return failed(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = static_cast<int>(settings.multiprocessors); break;
    case cudaDevAttrL2CacheSize: *value = static_cast<int>(settings.l2); break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = static_cast<int>(settings.major); break;
    case cudaDevAttrComputeCapabilityMinor: *value = static_cast<int>(settings.minor); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(settings.shared_memory) + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(settings.shared_memory); break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    default: return failed(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= settings.devices) return failed(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "emulated device");
  const auto shared = static_cast<std::size_t>(settings.shared_memory);
  properties->totalGlobalMem = static_cast<std::size_t>(settings.memory);
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = shared;
  properties->sharedMemPerMultiprocessor = shared + 1024;
  properties->reservedSharedMemPerBlock = 1024;
  properties->major = static_cast<int>(settings.major);
  properties->minor = static_cast<int>(settings.minor);
  properties->multiProcessorCount = static_cast<int>(settings.multiprocessors);
  properties->l2CacheSize = static_cast<int>(settings.l2);
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  *free_bytes = static_cast<std::size_t>(settings.free_memory);
  *total_bytes = static_cast<std::size_t>(settings.memory);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  *pointer = std::malloc(bytes);
  return *pointer == nullptr ? failed(cudaErrorMemoryAllocation) : cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// --- For tests, through ctypes ---------------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) int cortexloop_emulation_set(const char* name, long long value) {
  long long* const found = setting(name);
  if (found != nullptr) *found = value;
  return found != nullptr;
}

extern "C" __attribute__((visibility("default"))) long long cortexloop_emulation_get(const char* name) {
  const long long* const found = setting(name);
  return found != nullptr ? *found : -1;
}
