// Readouts in the module cortexloop._cpu: integers in, one call without the GIL, an exception on a bad status.
#include "cortexloop/readout.h"

#include <pybind11/pybind11.h>

#include "pointers.h"

namespace py = pybind11;
using namespace cortexloop;

void bind_readout(py::module_& m);

void bind_readout(py::module_& m) {
  m.def(
      "factorized_readout",
      [](std::uintptr_t features, std::int64_t batch, std::uintptr_t masks, std::uintptr_t vectors,
         std::int64_t neurons, std::int64_t rank, std::int64_t channels, std::int64_t positions,
         std::uintptr_t responses) {
        const FactorizedReadoutArgs args = {
            {pointer<const float>(masks), pointer<const float>(vectors), neurons, rank, channels, positions},
            pointer<const float>(features),
            batch,
            pointer<float>(responses)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::factorized_readout(args);
        }
        check(status);
      },
      py::arg("features_ptr"), py::arg("batch"), py::arg("masks_ptr"), py::arg("vectors_ptr"), py::arg("neurons"),
      py::arg("rank"), py::arg("channels"), py::arg("positions"), py::arg("responses_ptr"));
  m.def(
      "factorized_readout_gradient",
      [](std::uintptr_t features, std::int64_t batch, std::uintptr_t masks, std::uintptr_t vectors,
         std::int64_t neurons, std::int64_t rank, std::int64_t channels, std::int64_t positions,
         std::uintptr_t cotangent, std::uintptr_t d_features, std::uintptr_t d_masks, std::uintptr_t d_vectors) {
        const FactorizedReadoutGradientArgs args = {
            {pointer<const float>(masks), pointer<const float>(vectors), neurons, rank, channels, positions},
            pointer<const float>(features),
            batch,
            pointer<const float>(cotangent),
            pointer<float>(d_features),
            pointer<float>(d_masks),
            pointer<float>(d_vectors)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::factorized_readout_gradient(args);
        }
        check(status);
      },
      py::arg("features_ptr"), py::arg("batch"), py::arg("masks_ptr"), py::arg("vectors_ptr"), py::arg("neurons"),
      py::arg("rank"), py::arg("channels"), py::arg("positions"), py::arg("cotangent_ptr"), py::arg("d_features_ptr"),
      py::arg("d_masks_ptr"), py::arg("d_vectors_ptr"));
  m.def(
      "point_readout",
      [](std::uintptr_t features, std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
         std::uintptr_t positions, bool shared, std::uintptr_t vectors, std::int64_t neurons, bool align_corners,
         std::uintptr_t responses) {
        const PointReadoutArgs args = {{batch, channels, height, width, neurons, shared, align_corners},
                                       pointer<const float>(features),
                                       pointer<const float>(positions),
                                       pointer<const float>(vectors),
                                       pointer<float>(responses)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::point_readout(args);
        }
        check(status);
      },
      py::arg("features_ptr"), py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"),
      py::arg("positions_ptr"), py::arg("shared"), py::arg("vectors_ptr"), py::arg("neurons"), py::arg("align_corners"),
      py::arg("responses_ptr"));
  m.def(
      "point_readout_gradient",
      [](std::uintptr_t features, std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width,
         std::uintptr_t positions, bool shared, std::uintptr_t vectors, std::int64_t neurons, bool align_corners,
         std::uintptr_t cotangent, std::uintptr_t d_features, std::uintptr_t d_positions, std::uintptr_t d_vectors) {
        const PointReadoutGradientArgs args = {{batch, channels, height, width, neurons, shared, align_corners},
                                               pointer<const float>(features),
                                               pointer<const float>(positions),
                                               pointer<const float>(vectors),
                                               pointer<const float>(cotangent),
                                               pointer<float>(d_features),
                                               pointer<float>(d_positions),
                                               pointer<float>(d_vectors)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::point_readout_gradient(args);
        }
        check(status);
      },
      py::arg("features_ptr"), py::arg("batch"), py::arg("channels"), py::arg("height"), py::arg("width"),
      py::arg("positions_ptr"), py::arg("shared"), py::arg("vectors_ptr"), py::arg("neurons"), py::arg("align_corners"),
      py::arg("cotangent_ptr"), py::arg("d_features_ptr"), py::arg("d_positions_ptr"), py::arg("d_vectors_ptr"));
}
