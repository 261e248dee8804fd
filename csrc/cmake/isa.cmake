# One object library per instruction set that the compiler can target: the same kernels, other flags.
# Sets CORTEXLOOP_ISA_OBJECTS (to link) and CORTEXLOOP_ISA_DEFINITIONS (CORTEXLOOP_HAVE_<ISA>, for dispatch.cpp).
include(CheckCXXCompilerFlag)

set(CORTEXLOOP_ISA_OBJECTS "")
set(CORTEXLOOP_ISA_DEFINITIONS "")

# Contraction stays off so that a * b + c is fused exactly where the kernels say vfma. No LTO: it would let code compiled for
# a newer processor reach an older one.
if(MSVC)
  set(isa_common /O2 /fp:precise)
  set(isa_flags_avx2 /arch:AVX2)
  set(isa_flags_avx512 /arch:AVX512)
else()
  set(isa_common -O3 -fno-lto -fno-exceptions -fno-rtti -ffp-contract=off -fno-math-errno)
  set(isa_flags_avx2 -mavx2 -mfma)
  set(isa_flags_avx512 -mavx2 -mfma -mavx512f -mavx512vl -mavx512dq -mavx512bw -mprefer-vector-width=512)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 header sets off these warnings (GCC bug 105593).
    list(APPEND isa_flags_avx512 -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
  set(isa_flags_avx512_bf16 ${isa_flags_avx512} -mavx512vnni -mavx512bf16)
endif()

function(cortexloop_add_isa name)
  add_library(cortexloop_${name} OBJECT csrc/cpu/isa_${name}.cpp)
  target_link_libraries(cortexloop_${name} PRIVATE cortexloop_options)
  target_compile_options(cortexloop_${name} PRIVATE ${isa_common} ${isa_flags_${name}})
  string(TOUPPER ${name} upper)
  set(CORTEXLOOP_ISA_OBJECTS ${CORTEXLOOP_ISA_OBJECTS} $<TARGET_OBJECTS:cortexloop_${name}> PARENT_SCOPE)
  set(CORTEXLOOP_ISA_DEFINITIONS ${CORTEXLOOP_ISA_DEFINITIONS} CORTEXLOOP_HAVE_${upper} PARENT_SCOPE)
endfunction()

cortexloop_add_isa(generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(names avx2 avx512)
  if(NOT MSVC)  # the bfloat16 intrinsics are used in a form that only GCC and Clang take
    list(APPEND names avx512_bf16)
  endif()
  foreach(name ${names})
    string(REPLACE ";" " " flags "${isa_flags_${name}}")
    check_cxx_compiler_flag("${flags}" CORTEXLOOP_COMPILES_${name})
    if(CORTEXLOOP_COMPILES_${name})
      cortexloop_add_isa(${name})
    endif()
  endforeach()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  cortexloop_add_isa(neon)
endif()
