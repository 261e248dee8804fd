// Running moments of features, of the module cortexloop._cpu.
#include "cortexloop/moments.h"

#include <pybind11/pybind11.h>

#include "pointers.h"

namespace py = pybind11;
using namespace cortexloop;

void bind_moments(py::module_& m) {
  m.def(
      "feature_moments",
      [](std::uintptr_t features, int type, std::uintptr_t weights, std::uintptr_t centred, std::uintptr_t shift,
         double before, double batch, std::int64_t images, std::int64_t columns, std::int64_t neurons,
         std::uintptr_t mean, std::uintptr_t m2, std::uintptr_t cross) {
        const FeatureMomentsArgs args = {pointer<const void>(features),
                                         static_cast<FeatureType>(type),
                                         pointer<const float>(weights),
                                         pointer<const float>(centred),
                                         pointer<const float>(shift),
                                         before,
                                         batch,
                                         images,
                                         columns,
                                         neurons,
                                         pointer<double>(mean),
                                         pointer<double>(m2),
                                         pointer<float>(cross)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::feature_moments(args);
        }
        check(status);
      },
      py::arg("features_ptr"), py::arg("dtype"), py::arg("weights_ptr"), py::arg("centred_ptr"), py::arg("shift_ptr"),
      py::arg("before"), py::arg("batch"), py::arg("images"), py::arg("columns"), py::arg("neurons"),
      py::arg("mean_ptr"), py::arg("m2_ptr"), py::arg("cross_ptr"));
}
