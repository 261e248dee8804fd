# Whether, and for which devices, the CUDA kernels are built. Included before any target exists; sets
# CORTEXLOOP_HAVE_CUDA. `cortexloop_add_cuda_module()` makes the module `_cuda`.
include(CheckLanguage)
include(CheckSourceCompiles)

set(CORTEXLOOP_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO (where nvcc is found and works), ON or OFF")
set_property(CACHE CORTEXLOOP_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT CORTEXLOOP_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CORTEXLOOP_CUDA should be AUTO, ON or OFF, got ${CORTEXLOOP_CUDA}")
endif()

# Machine code for each architecture that this nvcc knows, and PTX for all others: devices from 10.0 on run
# compute_100, 11.0 and future ones among them.
macro(cortexloop_choose_architectures)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.8)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 86-virtual)
  elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 89-real 90-real 90-virtual)
  else()
    list(APPEND CMAKE_CUDA_ARCHITECTURES 89-real 90-real 100-real 120-real 100-virtual)
  endif()
endmacro()

# Whether a kernel in C++17 compiles, host side included: an nvcc that does not take this host compiler is found out
# here, and not in the middle of the build.
macro(cortexloop_try_cuda)
  set(cortexloop_architectures ${CMAKE_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_ARCHITECTURES 80)
  check_source_compiles(CUDA
    "#include <cuda_fp16.h>
     #include <tuple>
     template <class T> __global__ void kernel(T* x) { if constexpr (sizeof(T) == 2) *x = __float2half_rn(1.0f); }
     int main() {
       std::tuple<__half*> x{nullptr};
       void* arguments[] = {&std::get<0>(x)};
       return cudaLaunchKernel(kernel<__half>, dim3(1), dim3(1), arguments, 0, nullptr) != cudaSuccess;
     }"
    CORTEXLOOP_CUDA_WORKS)
  set(CMAKE_CUDA_ARCHITECTURES ${cortexloop_architectures})
endmacro()

set(CORTEXLOOP_HAVE_CUDA OFF)
if(NOT CORTEXLOOP_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})  # CUDA is often installed without being on PATH
    find_program(CORTEXLOOP_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    mark_as_advanced(CORTEXLOOP_NVCC)
    if(CORTEXLOOP_NVCC)
      set(ENV{CUDACXX} ${CORTEXLOOP_NVCC})  # a variable would keep check_language from trying it
    endif()
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(cortexloop_reason "no working CUDA compiler was found (put nvcc on PATH, or set CUDACXX)")
  else()
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_EXTENSIONS OFF)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(cortexloop_choose ON)
    if(DEFINED CMAKE_CUDA_ARCHITECTURES OR DEFINED ENV{CUDAARCHS})
      set(cortexloop_choose OFF)  # the builder's choice
    endif()
    enable_language(CUDA)
    if(cortexloop_choose)
      cortexloop_choose_architectures()
      set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES} CACHE STRING "CUDA architectures" FORCE)
    endif()
    if(CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.4)
      set(cortexloop_reason "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old (11.4 or later is needed)")
    else()
      cortexloop_try_cuda()
      if(CORTEXLOOP_CUDA_WORKS)
        set(CORTEXLOOP_HAVE_CUDA ON)
      else()
        set(cortexloop_reason
          "${CMAKE_CUDA_COMPILER} does not compile C++17 with ${CMAKE_CXX_COMPILER} (set CUDAHOSTCXX to an older compiler)")
      endif()
    endif()
  endif()
  if(CORTEXLOOP_HAVE_CUDA)
    message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
  elseif(CORTEXLOOP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CORTEXLOOP_CUDA=ON, but ${cortexloop_reason}")
  else()
    message(STATUS "CUDA kernels: not built, ${cortexloop_reason}")
  endif()
endif()

function(cortexloop_add_cuda_module)
  pybind11_add_module(_cuda MODULE NO_EXTRAS ${ARGN})
  target_include_directories(_cuda PRIVATE csrc/cuda)
  target_link_libraries(_cuda PRIVATE cortexloop_options)
  target_compile_options(_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;--threads=4>"
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${CORTEXLOOP_DEV}>>:--Werror=all-warnings>)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
    # A sixth of the size. Drivers older than CUDA 12.4 cannot read it; those of 13.0, which this needs anyway, can.
    target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
  endif()
  if(NOT MSVC)
    target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  endif()
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # The static runtime must stay private: another copy, brought by torch, is loaded into the same process.
    target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
  endif()
  install(TARGETS _cuda LIBRARY DESTINATION cortexloop)
endfunction()
