// The module cortexloop._cpu: integers in, one call without the GIL, an exception on a bad status. No logic here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cortexloop/bank.h"
#include "cortexloop/evolution.h"
#include "cortexloop/parallel.h"
#include "pointers.h"

namespace py = pybind11;
using namespace cortexloop;

void bind_readout(py::module_& m);

namespace {

BankView bank_view(std::uintptr_t weights, std::int64_t weights_size, std::uintptr_t table, std::int64_t n_models,
                   std::int64_t table_stride) {
  return {pointer<const float>(weights), weights_size, pointer<const std::int64_t>(table), n_models, table_stride};
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

BankForwardArgs forward_args(std::uintptr_t images, int type, int layout, std::int64_t batch, std::int64_t height,
                             std::int64_t width, std::uintptr_t weights, std::int64_t weights_size,
                             std::uintptr_t table, std::int64_t n_models, std::int64_t table_stride,
                             std::uintptr_t pairs, int precision, std::uintptr_t responses) {
  return {bank_view(weights, weights_size, table, n_models, table_stride),
          images_view(images, type, layout, batch, height, width), pointer<const std::int64_t>(pairs),
          static_cast<Precision>(precision), pointer<float>(responses)};
}

RandomRows random_rows(std::uint64_t seed, std::uint32_t stream, std::uint32_t step, std::uintptr_t problems,
                       std::int64_t n_problems, std::int64_t rows, std::int64_t columns) {
  return {seed, stream, step, pointer<const std::int64_t>(problems), n_problems, rows, columns};
}

}  // namespace

void bind_bank_pullback(py::module_& m);
void bind_moments(py::module_& m);
void bind_nmf(py::module_& m);
void bind_lasso(py::module_& m);

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "cortexloop's CPU kernels; use them through cortexloop.functional";
  m.def("isas", &cpu::isas);
  m.def("isa", &cpu::isa);
  m.def("set_isa", [](const std::string& name) { check(cpu::set_isa(name)); }, py::arg("name"));
  m.def("fast_supported", &cpu::fast_supported);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("count"));
  m.def(
      "bank_unsupported",
      [](std::uintptr_t table, std::int64_t n_models, std::int64_t table_stride) {
        constexpr std::int64_t kAnySize = std::int64_t{1} << 60;
        return cpu::bank_unsupported({nullptr, kAnySize, pointer<const std::int64_t>(table), n_models, table_stride});
      },
      py::arg("table_ptr"), py::arg("n_models"), py::arg("table_stride"));
  m.def(
      "bank_forward",
      [](std::uintptr_t images, int type, int layout, std::int64_t batch, std::int64_t height, std::int64_t width,
         std::uintptr_t weights, std::int64_t weights_size, std::uintptr_t table, std::int64_t n_models,
         std::int64_t table_stride, std::uintptr_t pairs, int precision, std::uintptr_t responses) {
        const BankForwardArgs args = forward_args(images, type, layout, batch, height, width, weights, weights_size,
                                                  table, n_models, table_stride, pairs, precision, responses);
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::bank_fwd(args);
        }
        check(status);
      },
      py::arg("images_ptr"), py::arg("dtype"), py::arg("layout"), py::arg("batch"), py::arg("height"), py::arg("width"),
      py::arg("weights_ptr"), py::arg("weights_len"), py::arg("table_ptr"), py::arg("n_models"),
      py::arg("table_stride"), py::arg("pairs_ptr"), py::arg("precision"), py::arg("out_ptr"));
  m.def(
      "bank_input_gradient",
      [](std::uintptr_t images, int type, int layout, std::int64_t batch, std::int64_t height, std::int64_t width,
         std::uintptr_t weights, std::int64_t weights_size, std::uintptr_t table, std::int64_t n_models,
         std::int64_t table_stride, std::uintptr_t pairs, std::uintptr_t cotangent, std::uintptr_t grad,
         std::uintptr_t responses) {
        const BankGradientArgs args = {bank_view(weights, weights_size, table, n_models, table_stride),
                                       images_view(images, type, layout, batch, height, width),
                                       pointer<const std::int64_t>(pairs),
                                       pointer<const float>(cotangent),
                                       pointer<float>(grad),
                                       pointer<float>(responses)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::bank_bwd(args);
        }
        check(status);
      },
      py::arg("images_ptr"), py::arg("dtype"), py::arg("layout"), py::arg("batch"), py::arg("height"), py::arg("width"),
      py::arg("weights_ptr"), py::arg("weights_len"), py::arg("table_ptr"), py::arg("n_models"),
      py::arg("table_stride"), py::arg("pairs_ptr"), py::arg("cotangent_ptr"), py::arg("grad_ptr"),
      py::arg("responses_ptr"));

  m.def(
      "random_rows",
      [](bool normal, std::uint64_t seed, std::uint32_t stream, std::uint32_t step, std::uintptr_t problems,
         std::int64_t n_problems, std::int64_t rows, std::int64_t columns, std::uintptr_t out) {
        const RandomRows random = random_rows(seed, stream, step, problems, n_problems, rows, columns);
        Status status;
        {
          py::gil_scoped_release release;
          status = normal ? cpu::random_normals(random, pointer<float>(out))
                          : cpu::random_uniforms(random, pointer<float>(out));
        }
        check(status);
      },
      py::arg("normal"), py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("problems_ptr"),
      py::arg("n_problems"), py::arg("rows"), py::arg("columns"), py::arg("out_ptr"));
  m.def(
      "sample_codes",
      [](std::uint64_t seed, std::uint32_t stream, std::uint32_t step, std::uintptr_t problems, std::int64_t n_problems,
         std::int64_t rows, std::int64_t columns, std::uintptr_t mean, std::uintptr_t scale, std::uintptr_t diagonal,
         std::uintptr_t left, std::uintptr_t right, std::int64_t rank, std::uintptr_t out) {
        const SampleArgs args = {random_rows(seed, stream, step, problems, n_problems, rows, columns),
                                 pointer<const float>(mean),
                                 pointer<const float>(scale),
                                 pointer<const float>(diagonal),
                                 {pointer<const float>(left), pointer<const float>(right), rank},
                                 pointer<float>(out)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::sample_codes(args);
        }
        check(status);
      },
      py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("problems_ptr"), py::arg("n_problems"),
      py::arg("rows"), py::arg("columns"), py::arg("mean_ptr"), py::arg("scale_ptr"), py::arg("diagonal_ptr"),
      py::arg("left_ptr"), py::arg("right_ptr"), py::arg("rank"), py::arg("out_ptr"));
  m.def(
      "code_moments",
      [](std::uintptr_t codes, std::uintptr_t weights, std::uintptr_t centre, std::int64_t n_problems,
         std::int64_t rows, std::int64_t columns, std::uintptr_t first, std::uintptr_t second) {
        const MomentsArgs args = {pointer<const float>(codes),
                                  pointer<const float>(weights),
                                  pointer<const float>(centre),
                                  n_problems,
                                  rows,
                                  columns,
                                  pointer<float>(first),
                                  pointer<float>(second)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::code_moments(args);
        }
        check(status);
      },
      py::arg("codes_ptr"), py::arg("weights_ptr"), py::arg("centre_ptr"), py::arg("n_problems"), py::arg("rows"),
      py::arg("columns"), py::arg("first_ptr"), py::arg("second_ptr"));
  m.def(
      "low_rank_product",
      [](std::uintptr_t x, std::uintptr_t left, std::uintptr_t right, std::int64_t rank, std::int64_t n_problems,
         std::int64_t columns, std::uintptr_t out) {
        const LowRankArgs args = {pointer<const float>(x),
                                  {pointer<const float>(left), pointer<const float>(right), rank},
                                  n_problems,
                                  columns,
                                  pointer<float>(out)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::low_rank_product(args);
        }
        check(status);
      },
      py::arg("x_ptr"), py::arg("left_ptr"), py::arg("right_ptr"), py::arg("rank"), py::arg("n_problems"),
      py::arg("columns"), py::arg("out_ptr"));

  m.def(
      "row_dots",
      [](std::uintptr_t x, std::uintptr_t y, std::int64_t n_problems, std::int64_t columns, std::uintptr_t out) {
        const RowDotsArgs args = {pointer<const float>(x), pointer<const float>(y), n_problems, columns,
                                  pointer<float>(out)};
        Status status;
        {
          py::gil_scoped_release release;
          status = cpu::row_dots(args);
        }
        check(status);
      },
      py::arg("x_ptr"), py::arg("y_ptr"), py::arg("n_problems"), py::arg("columns"), py::arg("out_ptr"));

  py::class_<cpu::BankPlan>(m, "BankPlan")
      .def(py::init([](std::uintptr_t images, int type, int layout, std::int64_t batch, std::int64_t height,
                       std::int64_t width, std::uintptr_t weights, std::int64_t weights_size, std::uintptr_t table,
                       std::int64_t n_models, std::int64_t table_stride, std::uintptr_t pairs, int precision,
                       std::uintptr_t responses) {
             std::unique_ptr<cpu::BankPlan> plan;
             check(cpu::BankPlan::make(forward_args(images, type, layout, batch, height, width, weights, weights_size,
                                                    table, n_models, table_stride, pairs, precision, responses),
                                       &plan));
             return plan;
           }),
           py::arg("images_ptr"), py::arg("dtype"), py::arg("layout"), py::arg("batch"), py::arg("height"),
           py::arg("width"), py::arg("weights_ptr"), py::arg("weights_len"), py::arg("table_ptr"), py::arg("n_models"),
           py::arg("table_stride"), py::arg("pairs_ptr"), py::arg("precision"), py::arg("out_ptr"))
      .def("run", [](cpu::BankPlan& plan) {
        Status status;
        {
          py::gil_scoped_release release;
          status = plan.run();
        }
        check(status);
      });

  bind_bank_pullback(m);
  bind_lasso(m);
  bind_moments(m);
  bind_nmf(m);
  bind_readout(m);
}
