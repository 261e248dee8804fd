// All kernels for one instruction set; compiled with the flags that csrc/cmake/isa.cmake gives for it.

#include "kernels/table.inl.h"

namespace cortexloop {
namespace cpu {

const Kernels* kernels_generic() {
  static constexpr Kernels kernels = make_kernels("generic");
  return &kernels;
}

}  // namespace cpu
}  // namespace cortexloop
