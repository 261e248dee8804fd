// From a row of the packed table to pointers, with every number checked against the buffer.
#pragma once

#include <string>

#include "kernel_table.h"

namespace cortexloop {
namespace cpu {

// "" and a filled view, or one sentence about what is wrong or not taken by the kernels.
std::string resolve_model(const BankView& bank, std::int64_t model, ModelView* view);

}  // namespace cpu
}  // namespace cortexloop
