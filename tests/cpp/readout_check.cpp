// Readouts for core_check: on integers every instruction set and thread count has to give the first one's bits. (What the bits
// should be, tests/ops knows.) Buffers have exactly the size that is promised, so that sanitizers see any step outside.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cortexloop/bank.h"
#include "cortexloop/parallel.h"
#include "cortexloop/readout.h"
#include "problem.h"

namespace {

using namespace cortexloop;

struct Sizes {
  std::int64_t batch, channels, height, width, neurons, rank;
};

std::vector<float> integers(std::int64_t count, unsigned seed) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int>(seed >> 24) % 5 - 2);
  }
  return values;
}

std::vector<std::vector<float>> factorized(const Sizes& s) {
  const std::int64_t positions = s.height * s.width;
  const std::vector<float> features = integers(s.batch * s.channels * positions, 1);
  const std::vector<float> masks = integers(s.neurons * s.rank * positions, 2);
  const std::vector<float> vectors = integers(s.neurons * s.rank * s.channels, 3);
  const std::vector<float> cotangent = integers(s.batch * s.neurons, 4);
  std::vector<float> out(cotangent.size()), d_features(features.size()), d_masks(masks.size()),
      d_vectors(vectors.size());
  const FactorizedWeights weights{masks.data(), vectors.data(), s.neurons, s.rank, s.channels, positions};
  expect_ok(cpu::factorized_readout({weights, features.data(), s.batch, out.data()}), "factorized_readout");
  expect_ok(cpu::factorized_readout_gradient({weights, features.data(), s.batch, cotangent.data(), d_features.data(),
                                              d_masks.data(), d_vectors.data()}),
            "factorized_readout_gradient");
  return {out, d_features, d_masks, d_vectors};
}

std::vector<std::vector<float>> point(const Sizes& s, bool shared) {
  const std::vector<float> features = integers(s.batch * s.channels * s.height * s.width, 1);
  std::vector<float> positions = integers((shared ? 1 : s.batch) * s.neurons * 2, 2);
  for (float& position : positions) position *= 0.625f;  // -1.25 to 1.25
  const std::vector<float> vectors = integers(s.neurons * s.channels, 3);
  const std::vector<float> cotangent = integers(s.batch * s.neurons, 4);
  std::vector<float> out(cotangent.size()), d_features(features.size()), d_positions(positions.size());
  std::vector<float> d_vectors(vectors.size());
  const PointReadoutShape shape{s.batch, s.channels, s.height, s.width, s.neurons, shared, true};
  expect_ok(cpu::point_readout({shape, features.data(), positions.data(), vectors.data(), out.data()}),
            "point_readout");
  expect_ok(cpu::point_readout_gradient({shape, features.data(), positions.data(), vectors.data(), cotangent.data(),
                                         d_features.data(), d_positions.data(), d_vectors.data()}),
            "point_readout_gradient");
  return {out, d_features, d_positions, d_vectors};
}

std::vector<std::vector<float>> everything(const Sizes& s) {
  std::vector<std::vector<float>> results = factorized(s);
  for (const bool shared : {true, false}) {
    for (std::vector<float>& values : point(s, shared)) results.push_back(values);
  }
  return results;
}

}  // namespace

void check_readouts() {
  const Sizes problems[] = {{2, 3, 5, 4, 7, 1},     {3, 17, 1, 1, 65, 2},    {5, 33, 9, 9, 64, 3},
                            {2, 7, 13, 19, 130, 1}, {4, 16, 3, 1, 1, 5},     {130, 2, 1, 3, 3, 2},
                            {1030, 1, 2, 2, 2, 2},  {1, 20, 12, 12, 270, 2}, {0, 3, 2, 2, 5, 2}};
  for (const Sizes& s : problems) {
    set_num_threads(1);
    expect_ok(cpu::set_isa("generic"), "generic");
    const std::vector<std::vector<float>> expected = everything(s);
    for (const std::string& isa : cpu::isas()) {
      expect_ok(cpu::set_isa(isa), isa);
      for (const int threads : {1, 3}) {
        set_num_threads(threads);
        const std::vector<std::vector<float>> got = everything(s);
        for (std::size_t i = 0; i < got.size(); ++i) {
          expect_equal(got[i], expected[i],
                       "readouts, " + isa + " on " + std::to_string(threads) + " threads, output " + std::to_string(i));
        }
      }
    }
  }
  if (cpu::point_readout({{1, 0, 1, 1, 1, true, true}, nullptr, nullptr, nullptr, nullptr}) !=
      Status::invalid_argument) {
    throw std::runtime_error("features without channels were taken");
  }
}
