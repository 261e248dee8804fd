// All kernels for one instruction set; compiled with the flags that csrc/cmake/isa.cmake gives for it.
#define CORTEXLOOP_ISA_NEON 1

#include "kernels/table.inl.h"

namespace cortexloop {
namespace cpu {

const Kernels* kernels_neon() {
  static constexpr Kernels kernels = make_kernels("neon");
  return &kernels;
}

}  // namespace cpu
}  // namespace cortexloop
