// All kernels for one instruction set; compiled with the flags that csrc/cmake/isa.cmake gives for it.
#define CORTEXLOOP_ISA_AVX512 1
#define CORTEXLOOP_ISA_BF16 1

#include "kernels/table.inl.h"

namespace cortexloop {
namespace cpu {

const Kernels* kernels_avx512_bf16() {
  static constexpr Kernels kernels = make_kernels("avx512_bf16");
  return &kernels;
}

}  // namespace cpu
}  // namespace cortexloop
