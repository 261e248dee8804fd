// Problems with exact answers in files, as tests/problem_files.py writes them, for programs that test without Python.
//
// A file: int64 {batch, height, width, n_models, table_stride, weights, with_pairs}, then float32 weights, int64 table,
// uint8 images (NHWC), float32 the same recentred, int64 pairs [batch], float32 cotangent, expected responses, expected
// gradient. Every buffer is its own allocation, so that a read or write one element too far is seen.
#pragma once

#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cortexloop/status.h"

namespace cortexloop {

struct Problem {
  std::int64_t batch, height, width, n_models, table_stride, weights_size, with_pairs;
  std::vector<float> weights;
  std::vector<std::int64_t> table;
  std::vector<std::uint8_t> pixels;
  std::vector<float> images;
  std::vector<std::int64_t> pairs;
  std::vector<float> cotangent, responses, grad_images;
};

template <class T>
std::vector<T> read(std::ifstream& file, std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  if (!file) throw std::runtime_error("the file is too short");
  return values;
}

inline Problem read_problem(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const auto header = read<std::int64_t>(file, 7);
  Problem p{header[0], header[1], header[2], header[3], header[4], header[5], header[6], {},
            {},        {},        {},        {},        {},        {},        {}};
  const std::int64_t values = p.batch * p.height * p.width * 3;
  const std::int64_t outputs = p.with_pairs != 0 ? p.batch : p.batch * p.n_models;
  p.weights = read<float>(file, p.weights_size);
  p.table = read<std::int64_t>(file, p.n_models * p.table_stride);
  p.pixels = read<std::uint8_t>(file, values);
  p.images = read<float>(file, values);
  p.pairs = read<std::int64_t>(file, p.batch);
  p.cotangent = read<float>(file, outputs);
  p.responses = read<float>(file, outputs);
  p.grad_images = read<float>(file, values);
  return p;
}

inline std::vector<float> to_nchw(const std::vector<float>& nhwc, const Problem& p) {
  std::vector<float> out(nhwc.size());
  const std::int64_t plane = p.height * p.width;
  for (std::int64_t n = 0; n < p.batch; ++n) {
    for (std::int64_t i = 0; i < plane; ++i) {
      for (std::int64_t c = 0; c < 3; ++c) {
        out[static_cast<std::size_t>((n * 3 + c) * plane + i)] =
            nhwc[static_cast<std::size_t>((n * plane + i) * 3 + c)];
      }
    }
  }
  return out;
}

inline void expect_equal(const std::vector<float>& got, const std::vector<float>& expected, const std::string& what) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (!(got[i] == expected[i])) {
      throw std::runtime_error(what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) +
                               ", expected " + std::to_string(expected[i]));
    }
  }
}

inline void expect_ok(Status status, const std::string& what) {
  if (status != Status::ok) throw std::runtime_error(what + ": " + last_error());
}

}  // namespace cortexloop
