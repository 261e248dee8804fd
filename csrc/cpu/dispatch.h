// The function table in force; see dispatch.cpp.
#pragma once

#include "kernel_table.h"

namespace cortexloop {
namespace cpu {

const Kernels& kernels();

}  // namespace cpu
}  // namespace cortexloop
