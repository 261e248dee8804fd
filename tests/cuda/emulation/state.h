// What the parts of the emulation share: the device's settings, the last error.
#pragma once

#include <string>

#include "emulation.h"

namespace cortexloop::emulation {

// What tests set and read by name, through cortexloop_emulation_set and _get.
struct Settings {
  long long devices = 1;
  long long driver = 13000;  // 0: no driver
  long long multiprocessors = 2;
  long long shared_memory = 227 * 1024;  // most that a block may ask for
  long long major = 9;
  long long minor = 0;
  long long l2 = 50 << 20;
  long long memory = 8LL << 30;
  long long free_memory = 6LL << 30;
  long long schedule = 0;
  long long fail_launch = 0;  // the next launch fails with this error, and this becomes 0
  long long launches = 0;     // counters, from here on
  long long blocks = 0;
  long long matrix_instructions = 0;
};

extern Settings settings;
extern std::string misused;  // the text of cudaErrorLaunchFailure

// Stores the error for cudaGetLastError.
cudaError_t failed(cudaError_t error);

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

inline std::string place(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return format("%s:%d", slash == nullptr ? site.file : slash + 1, site.line);
}

const char* name_of(Kind kind);

}  // namespace cortexloop::emulation
