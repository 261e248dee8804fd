// Lasso in the module cortexloop._cpu: integers in, one call without the GIL, an exception on a bad status. No logic
// here.
#include "cortexloop/lasso.h"

#include <pybind11/pybind11.h>

#include "pointers.h"

namespace py = pybind11;
using namespace cortexloop;

void bind_lasso(py::module_& m);

void bind_lasso(py::module_& m) {
  m.def(
      "lasso_path",
      [](std::uintptr_t gram, std::uintptr_t columns, std::uintptr_t mask, std::uintptr_t means,
         std::uintptr_t diagonal, std::int64_t n_sets, std::int64_t features, std::int64_t images,
         std::uintptr_t set_of, std::uintptr_t responses, std::uintptr_t cross, std::uintptr_t squares,
         std::uintptr_t penalties, std::int64_t n_problems, std::int64_t n_penalties, double tolerance,
         std::int64_t max_sweeps, std::uintptr_t weights, std::uintptr_t gaps, std::uintptr_t sweeps) {
        const LassoPathArgs args = {
            {pointer<const double>(gram), pointer<const double>(columns), pointer<const double>(mask),
             pointer<const double>(means), pointer<const double>(diagonal), n_sets, features, images},
            pointer<const std::int64_t>(set_of),
            pointer<const double>(responses),
            pointer<const double>(cross),
            pointer<const double>(squares),
            pointer<const double>(penalties),
            n_problems,
            n_penalties,
            tolerance,
            max_sweeps,
            pointer<double>(weights),
            pointer<double>(gaps),
            pointer<std::int64_t>(sweeps)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::lasso_path(args);
        }
        if (status == Status::ok) return;
        if (status == Status::invalid_argument) throw py::value_error(last_error());
        PyErr_SetString(PyExc_MemoryError, last_error());
        throw py::error_already_set();
      },
      py::arg("gram_ptr"), py::arg("columns_ptr"), py::arg("mask_ptr"), py::arg("means_ptr"), py::arg("diagonal_ptr"),
      py::arg("n_sets"), py::arg("features"), py::arg("images"), py::arg("set_of_ptr"), py::arg("responses_ptr"),
      py::arg("cross_ptr"), py::arg("squares_ptr"), py::arg("penalties_ptr"), py::arg("n_problems"),
      py::arg("n_penalties"), py::arg("tolerance"), py::arg("max_sweeps"), py::arg("weights_ptr"), py::arg("gaps_ptr"),
      py::arg("sweeps_ptr"));
}
