#include "cortexloop/status.h"

#include <cstdarg>
#include <cstdio>

namespace cortexloop {
namespace {
thread_local char message[512] = "";
}

const char* last_error() { return message; }

Status fail(Status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace cortexloop
