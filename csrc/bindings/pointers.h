// What all bindings do: addresses to pointers, statuses to exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include "cortexloop/status.h"

namespace cortexloop {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void check(Status status) {
  if (status == Status::ok) return;
  if (status == Status::invalid_argument) throw pybind11::value_error(last_error());
  PyErr_SetString(PyExc_MemoryError, last_error());
  throw pybind11::error_already_set();
}

}  // namespace cortexloop
