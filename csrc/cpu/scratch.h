// Memory for the time of one call, or a status instead of an exception.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "cortexloop/status.h"

namespace cortexloop {
namespace cpu {

// `count` numbers without a value, or null without memory.
template <class T = float>
std::unique_ptr<T[]> scratch(std::int64_t count) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[static_cast<std::size_t>(count > 0 ? count : 1)]);
}

inline Status no_scratch(std::int64_t count) {
  return fail(Status::out_of_memory, "no memory for %lld numbers of scratch", static_cast<long long>(count));
}

}  // namespace cpu
}  // namespace cortexloop
