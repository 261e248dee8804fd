// bank_pullback of the module cortexloop._cpu.
#include <pybind11/pybind11.h>

#include "cortexloop/bank.h"

#include "pointers.h"

namespace py = pybind11;
using namespace cortexloop;

void bind_bank_pullback(py::module_& m);

void bind_bank_pullback(py::module_& m) {
  m.def(
      "bank_pullback",
      [](std::uintptr_t images, int type, int layout, std::int64_t batch, std::int64_t height, std::int64_t width,
         std::uintptr_t weights, std::int64_t weights_size, std::uintptr_t table, std::int64_t n_models,
         std::int64_t table_stride, std::uintptr_t cotangents, std::int64_t count, std::uintptr_t grads) {
        const BankPullbackArgs args = {
            {pointer<const float>(weights), weights_size, pointer<const std::int64_t>(table), n_models, table_stride},
            {pointer<const void>(images), static_cast<PixelType>(type), static_cast<ImageLayout>(layout), batch, height,
             width},
            pointer<const float>(cotangents),
            count,
            pointer<float>(grads)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::bank_pullback(args);
        }
        if (status == Status::ok) return;
        if (status == Status::invalid_argument) throw py::value_error(last_error());
        PyErr_SetString(PyExc_MemoryError, last_error());
        throw py::error_already_set();
      },
      py::arg("images_ptr"), py::arg("dtype"), py::arg("layout"), py::arg("batch"), py::arg("height"), py::arg("width"),
      py::arg("weights_ptr"), py::arg("weights_len"), py::arg("table_ptr"), py::arg("n_models"),
      py::arg("table_stride"), py::arg("cotangents_ptr"), py::arg("count"), py::arg("grads_ptr"));
}
