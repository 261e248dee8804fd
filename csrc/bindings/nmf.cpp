// Non-negative factorization in the module cortexloop._cpu: integers in, one call without the GIL, an exception on a bad status.
#include "cortexloop/nmf.h"

#include <pybind11/pybind11.h>

#include "pointers.h"

namespace py = pybind11;
using namespace cortexloop;

void bind_nmf(py::module_& m);

void bind_nmf(py::module_& m) {
  m.def(
      "nmf",
      [](std::uintptr_t matrices, std::int64_t problems, std::int64_t rows, std::int64_t columns, std::int64_t rank,
         bool is_signed, float l1_w, float l2_w, float l1_h, float l2_h, float tolerance, std::int64_t max_iterations,
         std::uintptr_t w, std::uintptr_t h, std::uintptr_t iterations) {
        const NmfArgs args = {reinterpret_cast<const float*>(matrices),
                              problems,
                              rows,
                              columns,
                              rank,
                              is_signed,
                              l1_w,
                              l2_w,
                              l1_h,
                              l2_h,
                              tolerance,
                              max_iterations,
                              reinterpret_cast<float*>(w),
                              reinterpret_cast<float*>(h),
                              reinterpret_cast<std::int64_t*>(iterations)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::nmf(args);
        }
        if (status == Status::ok) return;
        if (status == Status::invalid_argument) throw py::value_error(last_error());
        PyErr_SetString(PyExc_MemoryError, last_error());
        throw py::error_already_set();
      },
      py::arg("matrices_ptr"), py::arg("problems"), py::arg("rows"), py::arg("columns"), py::arg("rank"),
      py::arg("is_signed"), py::arg("l1_w"), py::arg("l2_w"), py::arg("l1_h"), py::arg("l2_h"), py::arg("tolerance"),
      py::arg("max_iterations"), py::arg("w_ptr"), py::arg("h_ptr"), py::arg("iterations_ptr"));
}
