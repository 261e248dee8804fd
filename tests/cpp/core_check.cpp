// Runs the C++ core without Python, for sanitizers: reads problems with exact answers, solves each with every instruction set
// and several thread counts, alone and from concurrent callers, and compares bits.
//
//   core_check FILE...
//
// Files are described in problem.h.
//
// Then the operators on populations of codes, and readouts (readout_check.cpp): every instruction set and thread count has to
// give the first one's bits.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cortexloop/bank.h"
#include "cortexloop/evolution.h"
#include "cortexloop/moments.h"
#include "cortexloop/parallel.h"
#include "problem.h"

void check_readouts();

namespace {

using namespace cortexloop;

void solve(const Problem& p, const std::string& where) {
  const BankView bank{p.weights.data(), p.weights_size, p.table.data(), p.n_models, p.table_stride};
  const std::int64_t* pairs = p.with_pairs != 0 ? p.pairs.data() : nullptr;
  const std::vector<float> nchw = to_nchw(p.images, p);
  const std::vector<float> grad_nchw = to_nchw(p.grad_images, p);
  struct Form {
    const char* name;
    const void* data;
    PixelType type;
    ImageLayout layout;
  };
  const Form forms[] = {{"u8 NHWC", p.pixels.data(), PixelType::u8, ImageLayout::nhwc},
                        {"f32 NHWC", p.images.data(), PixelType::f32, ImageLayout::nhwc},
                        {"f32 NCHW", nchw.data(), PixelType::f32, ImageLayout::nchw}};
  for (const Form& form : forms) {
    const ImagesView images{form.data, form.type, form.layout, p.batch, p.height, p.width};
    std::vector<float> responses(p.responses.size(), -1.0f), again(p.responses.size(), -1.0f);
    std::vector<float> grad(p.grad_images.size(), -1.0f);
    expect_ok(cpu::bank_fwd({bank, images, pairs, Precision::exact, responses.data()}), where + form.name);
    expect_equal(responses, p.responses, where + form.name + " forward");
    expect_ok(cpu::bank_bwd({bank, images, pairs, p.cotangent.data(), grad.data(), again.data()}), where + form.name);
    expect_equal(again, p.responses, where + form.name + " responses beside the gradient");
    expect_equal(grad, form.layout == ImageLayout::nhwc ? p.grad_images : grad_nchw, where + form.name + " gradient");
    expect_ok(cpu::bank_fwd({bank, images, pairs, Precision::fast, again.data()}),
              where + form.name);  // runs; not exact

    std::unique_ptr<cpu::BankPlan> plan;
    expect_ok(cpu::BankPlan::make({bank, images, pairs, Precision::exact, again.data()}, &plan), where);
    for (int i = 0; i < 2; ++i) {
      expect_ok(plan->run(), where);
      expect_equal(again, p.responses, where + form.name + " plan");
    }
  }
}

// Tables with wrong numbers must be refused, not followed.
void refuse(Problem p) {
  for (std::size_t column = 0; column < static_cast<std::size_t>(p.table_stride); ++column) {
    for (const std::int64_t value : {std::int64_t{-1}, std::int64_t{1} << 40, std::int64_t{1} << 62}) {
      const std::int64_t kept = p.table[column];
      p.table[column] = value;
      const BankView bank{p.weights.data(), p.weights_size, p.table.data(), p.n_models, p.table_stride};
      const ImagesView images{p.pixels.data(), PixelType::u8, ImageLayout::nhwc, p.batch, p.height, p.width};
      std::vector<float> responses(p.responses.size());
      const std::int64_t* pairs = p.with_pairs != 0 ? p.pairs.data() : nullptr;
      static_cast<void>(cpu::bank_fwd({bank, images, pairs, Precision::exact, responses.data()}));
      p.table[column] = kept;
    }
  }
}

// Everything that is computed on codes [problems, rows, columns], one output after the other.
std::vector<std::vector<float>> codes_of(std::int64_t problems, std::int64_t rows, std::int64_t columns,
                                         std::int64_t rank) {
  std::vector<std::int64_t> ids;
  for (std::int64_t p = 0; p < problems; ++p) ids.push_back(3 * p + 1);
  const RandomRows random{0x123456789abcdefULL, 5, 7, ids.data(), problems, rows, columns};
  const auto floats = [](std::int64_t count) { return std::vector<float>(static_cast<std::size_t>(count)); };
  std::vector<float> uniforms = floats(problems * rows * columns), normals = uniforms, codes = uniforms;
  std::vector<float> first = floats(problems * columns), second = first, product = first, dots = floats(problems);
  std::vector<float> mean = first, left = floats(problems * rank * columns), right = left;
  std::vector<float> scale(static_cast<std::size_t>(problems), 0.5f);
  std::vector<float> weights = floats(problems * rows);
  for (std::size_t i = 0; i < mean.size(); ++i) mean[i] = static_cast<float>(i % 13) - 6.0f;
  for (std::size_t i = 0; i < left.size(); ++i) left[i] = static_cast<float>(i % 7) / 8.0f, right[i] = 1.0f - left[i];
  for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i % 3);
  const LowRank factors{left.data(), right.data(), rank};
  expect_ok(cpu::random_uniforms(random, uniforms.data()), "random_uniforms");
  expect_ok(cpu::random_normals(random, normals.data()), "random_normals");
  expect_ok(cpu::sample_codes({random, mean.data(), scale.data(), mean.data(), factors, codes.data()}), "sample_codes");
  expect_ok(cpu::code_moments(
                {codes.data(), weights.data(), mean.data(), problems, rows, columns, first.data(), second.data()}),
            "code_moments");
  expect_ok(cpu::low_rank_product({mean.data(), factors, problems, columns, product.data()}), "low_rank_product");
  expect_ok(cpu::row_dots({mean.data(), product.data(), problems, columns, dots.data()}), "row_dots");
  return {uniforms, normals, codes, first, second, product, dots};
}

void check_codes(std::int64_t problems, std::int64_t rows, std::int64_t columns, std::int64_t rank) {
  set_num_threads(1);
  expect_ok(cpu::set_isa("generic"), "generic");
  const std::vector<std::vector<float>> expected = codes_of(problems, rows, columns, rank);
  const auto compare = [&](const std::string& where) {
    const std::vector<std::vector<float>> got = codes_of(problems, rows, columns, rank);
    for (std::size_t i = 0; i < got.size(); ++i)
      expect_equal(got[i], expected[i], where + ", output " + std::to_string(i));
  };
  for (const std::string& isa : cpu::isas()) {
    expect_ok(cpu::set_isa(isa), isa);
    for (const int threads : {1, 2, 3}) {
      set_num_threads(threads);
      compare("codes, " + isa + " on " + std::to_string(threads) + " threads");
    }
    std::vector<std::thread> callers;
    std::vector<std::string> failures(3);
    for (std::string& failure : failures) {
      callers.emplace_back([&] {
        try {
          compare("codes, " + isa + " from concurrent callers");
        } catch (const std::exception& error) { failure = error.what(); }
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::string& failure : failures) {
      if (!failure.empty()) throw std::runtime_error(failure);
    }
  }
}

void refuse_codes() {
  const std::int64_t id = -1;
  float out[4];
  const RandomRows random{0, 0, 0, &id, 1, 1, 4};
  if (cpu::random_normals(random, out) != Status::invalid_argument)
    throw std::runtime_error("a negative problem was taken");
}

// Two batches that join moments: one as 32-bit, one as 16-bit features, [images, columns], integers with a mean of 0 over every
// whole number of 4 images. Every buffer ends where it should.
std::vector<std::vector<float>> moments_of(std::int64_t images, std::int64_t columns, std::int64_t neurons) {
  const auto size = [](std::int64_t count) { return static_cast<std::size_t>(count); };
  std::vector<float> features(size(images * columns)), weights(size(images), 2.0f), centred(size(images * neurons));
  std::vector<std::uint16_t> half(features.size()), brain(features.size());
  std::vector<float> shift(size(neurons)), cross(size(neurons * columns));
  std::vector<double> mean(size(columns)), m2(size(columns));
  for (std::int64_t i = 0; i < images; ++i) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::size_t at = size(i * columns + c);
      const bool plus = images % 4 != 0 || (i + c) % 4 < 2;
      features[at] = plus ? 2.0f : -2.0f;
      half[at] = plus ? 0x4000u : 0xc000u;
      brain[at] = plus ? 0x4000u : 0xc000u;
    }
    for (std::int64_t t = 0; t < neurons; ++t) centred[size(i * neurons + t)] = static_cast<float>((i * 3 + t) % 5 - 2);
  }
  for (std::int64_t t = 0; t < neurons; ++t) shift[size(t)] = static_cast<float>(t % 3);
  const double total = static_cast<double>(images);
  FeatureMomentsArgs args = {features.data(), FeatureType::f32, nullptr, centred.data(), shift.data(), 0.0,
                             total,           images,           columns, neurons,        mean.data(),  m2.data(),
                             cross.data()};
  expect_ok(cpu::feature_moments(args), "feature_moments");
  args.before = total;
  args.features = half.data();
  args.type = FeatureType::f16;
  expect_ok(cpu::feature_moments(args), "feature_moments of float16");
  args.before = args.batch = 2.0 * total;
  args.weights = weights.data();
  args.features = brain.data();
  args.type = FeatureType::bf16;
  expect_ok(cpu::feature_moments(args), "feature_moments of bfloat16");
  return {std::vector<float>(mean.begin(), mean.end()), std::vector<float>(m2.begin(), m2.end()), cross};
}

void check_moments(std::int64_t images, std::int64_t columns, std::int64_t neurons) {
  set_num_threads(1);
  expect_ok(cpu::set_isa("generic"), "generic");
  const std::vector<std::vector<float>> expected = moments_of(images, columns, neurons);
  const float variance = images % 4 != 0 ? 0.0f : 4.0f;
  expect_equal(expected[1], std::vector<float>(expected[1].size(), variance * 4.0f * static_cast<float>(images)), "m2");
  for (const std::string& isa : cpu::isas()) {
    expect_ok(cpu::set_isa(isa), isa);
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      const std::vector<std::vector<float>> got = moments_of(images, columns, neurons);
      for (std::size_t i = 0; i < got.size(); ++i) {
        expect_equal(got[i], expected[i], "moments, " + isa + " on " + std::to_string(threads) + " threads");
      }
    }
  }
}

void refuse_moments() {
  FeatureMomentsArgs args = {};
  if (cpu::feature_moments(args) != Status::invalid_argument) throw std::runtime_error("no images were taken");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (int a = 1; a < argc; ++a) {
      const Problem problem = read_problem(argv[a]);
      for (const std::string& isa : cpu::isas()) {
        expect_ok(cpu::set_isa(isa), isa);
        for (const int threads : {1, 2, 3}) {
          set_num_threads(threads);
          solve(problem, isa + " on " + std::to_string(threads) + " threads, ");
        }
        set_num_threads(2);
        std::vector<std::thread> callers;
        std::vector<std::string> failures(3);
        for (std::string& failure : failures) {
          callers.emplace_back([&] {
            try {
              solve(problem, isa + " from concurrent callers, ");
            } catch (const std::exception& error) { failure = error.what(); }
          });
        }
        for (std::thread& caller : callers) caller.join();
        for (const std::string& failure : failures) {
          if (!failure.empty()) throw std::runtime_error(failure);
        }
      }
      refuse(problem);
    }
    for (const std::int64_t columns : {1, 63, 64, 65, 1300, 9000}) check_codes(3, 4, columns, columns % 3);
    check_codes(0, 4, 8, 1);
    check_codes(2, 0, 8, 1);
    refuse_codes();
    for (const std::int64_t columns : {1, 49, 1500}) {
      check_moments(5, columns, 3);
      check_moments(132, columns, 9);
    }
    refuse_moments();
    check_readouts();
    if (cpu::set_isa("none such") != Status::invalid_argument)
      throw std::runtime_error("an unknown instruction set was taken");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "core_check: %s\n", error.what());
    return 1;
  }
  std::puts("core_check: all equal");
  return 0;
}
