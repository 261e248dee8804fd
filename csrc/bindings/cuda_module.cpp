// The module cortexloop._cuda: integers in, one call without the GIL, an exception on a bad status. No logic here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cortexloop/bank.h"
#include "cortexloop/moments.h"

namespace py = pybind11;
using namespace cortexloop;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(Status status) {
  if (status == Status::ok) return;
  if (status == Status::invalid_argument) throw py::value_error(last_error());
  if (status == Status::device_error) throw std::runtime_error(last_error());
  PyErr_SetString(PyExc_MemoryError, last_error());
  throw py::error_already_set();
}

ImagesView images_view(std::uintptr_t images, int type, int layout, std::int64_t batch, std::int64_t height,
                       std::int64_t width) {
  return {pointer<const void>(images),
          static_cast<PixelType>(type),
          static_cast<ImageLayout>(layout),
          batch,
          height,
          width};
}

cuda::Place place(std::uintptr_t packed, std::uintptr_t workspace, std::int64_t workspace_bytes, int device,
                  std::uintptr_t stream) {
  return {pointer<const void>(packed), pointer<void>(workspace), workspace_bytes, device, pointer<void>(stream)};
}

// A bank of which only the table is read.
BankView table_alone(std::uintptr_t table, std::int64_t n_models, std::int64_t table_stride) {
  constexpr std::int64_t kAnySize = std::int64_t{1} << 60;
  return {nullptr, kAnySize, pointer<const std::int64_t>(table), n_models, table_stride};
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "cortexloop's CUDA kernels; use them through cortexloop.functional";
  m.def("emulated", &cuda::emulated);
  m.def("unavailable", &cuda::unavailable);
  m.def("device_count", &cuda::device_count);
  m.def(
      "device",
      [](int index) {
        cuda::Device found;
        check(cuda::device(index, &found));
        py::dict facts;
        facts["name"] = found.name;
        facts["major"] = found.major;
        facts["minor"] = found.minor;
        facts["multiprocessors"] = found.multiprocessors;
        facts["shared_memory"] = found.shared_memory;
        facts["memory"] = found.memory;
        facts["l2"] = found.l2;
        return facts;
      },
      py::arg("index"));
  m.def("device_unsupported", &cuda::device_unsupported, py::arg("index"));

  m.def(
      "bank_unsupported",
      [](std::uintptr_t table, std::int64_t n_models, std::int64_t table_stride) {
        return cuda::bank_unsupported(table_alone(table, n_models, table_stride));
      },
      py::arg("table_ptr"), py::arg("n_models"), py::arg("table_stride"));
  m.def(
      "bank_note",
      [](std::uintptr_t table, std::int64_t n_models, std::int64_t table_stride) {
        return cuda::bank_note(table_alone(table, n_models, table_stride));
      },
      py::arg("table_ptr"), py::arg("n_models"), py::arg("table_stride"));

  m.def(
      "feature_moments",
      [](std::uintptr_t features, int type, std::uintptr_t weights, std::uintptr_t centred, std::uintptr_t shift,
         double before, double batch, std::int64_t images, std::int64_t columns, std::int64_t neurons,
         std::uintptr_t mean, std::uintptr_t m2, std::uintptr_t cross, int device, std::uintptr_t stream) {
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
          status = cuda::feature_moments(args, device, pointer<void>(stream));
        }
        check(status);
      },
      py::arg("features_ptr"), py::arg("dtype"), py::arg("weights_ptr"), py::arg("centred_ptr"), py::arg("shift_ptr"),
      py::arg("before"), py::arg("batch"), py::arg("images"), py::arg("columns"), py::arg("neurons"),
      py::arg("mean_ptr"), py::arg("m2_ptr"), py::arg("cross_ptr"), py::arg("device"), py::arg("stream"));

  // Local: tests load this module several times, compiled in different ways.
  py::class_<cuda::Bank>(m, "Bank", py::module_local())
      .def(py::init([](std::uintptr_t weights, std::int64_t weights_size, std::uintptr_t table, std::int64_t n_models,
                       std::int64_t table_stride) {
             std::unique_ptr<cuda::Bank> bank;
             check(cuda::Bank::make({pointer<const float>(weights), weights_size, pointer<const std::int64_t>(table),
                                     n_models, table_stride},
                                    &bank));
             return bank;
           }),
           py::arg("weights_ptr"), py::arg("weights_len"), py::arg("table_ptr"), py::arg("n_models"),
           py::arg("table_stride"))
      .def("device_image",
           [](const cuda::Bank& bank) {
             return py::bytes(reinterpret_cast<const char*>(bank.packed().data()), bank.packed().size());
           })
      .def(
          "forward_workspace",
          [](const cuda::Bank& bank, int device, int type, std::int64_t batch, bool paired, int precision) {
            std::int64_t bytes = 0;
            check(bank.forward_workspace(device, static_cast<PixelType>(type), batch, paired,
                                         static_cast<Precision>(precision), &bytes));
            return bytes;
          },
          py::arg("device"), py::arg("dtype"), py::arg("batch"), py::arg("paired"), py::arg("precision"))
      .def(
          "forward",
          [](const cuda::Bank& bank, std::uintptr_t packed, std::uintptr_t images, int type, int layout,
             std::int64_t batch, std::int64_t height, std::int64_t width, std::uintptr_t pairs, int precision,
             std::uintptr_t responses, std::uintptr_t workspace, std::int64_t workspace_bytes, int device,
             std::uintptr_t stream) {
            const BankForwardArgs args = {{},
                                          images_view(images, type, layout, batch, height, width),
                                          pointer<const std::int64_t>(pairs),
                                          static_cast<Precision>(precision),
                                          pointer<float>(responses)};
            Status status;
            {
              py::gil_scoped_release release;
              status = bank.forward(args, place(packed, workspace, workspace_bytes, device, stream));
            }
            check(status);
          },
          py::arg("image_ptr"), py::arg("images_ptr"), py::arg("dtype"), py::arg("layout"), py::arg("batch"),
          py::arg("height"), py::arg("width"), py::arg("pairs_ptr"), py::arg("precision"), py::arg("out_ptr"),
          py::arg("workspace_ptr"), py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"))
      .def(
          "gradient_workspace",
          [](const cuda::Bank& bank, int device, int type, std::int64_t batch, bool paired) {
            std::int64_t bytes = 0;
            check(bank.gradient_workspace(device, static_cast<PixelType>(type), batch, paired, &bytes));
            return bytes;
          },
          py::arg("device"), py::arg("dtype"), py::arg("batch"), py::arg("paired"))
      .def(
          "gradient",
          [](const cuda::Bank& bank, std::uintptr_t packed, std::uintptr_t images, int type, int layout,
             std::int64_t batch, std::int64_t height, std::int64_t width, std::uintptr_t pairs,
             std::uintptr_t cotangent, std::uintptr_t grad, std::uintptr_t responses, std::uintptr_t workspace,
             std::int64_t workspace_bytes, int device, std::uintptr_t stream) {
            const BankGradientArgs args = {{},
                                           images_view(images, type, layout, batch, height, width),
                                           pointer<const std::int64_t>(pairs),
                                           pointer<const float>(cotangent),
                                           pointer<float>(grad),
                                           pointer<float>(responses)};
            Status status;
            {
              py::gil_scoped_release release;
              status = bank.gradient(args, place(packed, workspace, workspace_bytes, device, stream));
            }
            check(status);
          },
          py::arg("image_ptr"), py::arg("images_ptr"), py::arg("dtype"), py::arg("layout"), py::arg("batch"),
          py::arg("height"), py::arg("width"), py::arg("pairs_ptr"), py::arg("cotangent_ptr"), py::arg("grad_ptr"),
          py::arg("responses_ptr"), py::arg("workspace_ptr"), py::arg("workspace_bytes"), py::arg("device"),
          py::arg("stream"));
}
