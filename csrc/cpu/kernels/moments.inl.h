// Running moments of features (formulas in cortexloop/moments.h): tiles of neighbouring columns, in panels of a few vectors.
//
// A panel of up to kRowBlock images is read once: converted to floats and summed, centred at the mean of the first block of images
// and summed again (sums of deviations and of their squares, which also correct the centre), all in the first-level cache. Then
//
//   cross[t][c] += sum_i centred_i[t] (x_i[c] - centre[c]) + f shift[t] d[c] - (sum_i centred_i[t]) (xb[c] - centre[c])
//
// as one product of depth images + 2, P neurons x N vectors in registers. While a tile is multiplied, the features and the part of
// `cross` that come next are asked for line by line, a row of the tile after the other: runs of a kilobyte come from memory twice
// as fast as those of a panel, which the processor's own prefetchers do not follow.
//
// Order of summation: images in order within a block, blocks in order; the same for every instruction set.
#pragma once

#include "../kernel_table.h"
#include "../simd.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kPanelVectors = 3;
constexpr int kPanel = kPanelVectors * kLanes;
constexpr int kPanelNeurons = kRegisters >= 32 ? 8 : 4;
constexpr int kRowBlock = 128;     // a panel of 48 columns is 25 KB
constexpr int kMomentsTile = 480;  // columns
constexpr int kCacheLine = 64;     // bytes
static_assert(kMomentsTile % kPanel == 0, "no panel crosses tiles");
static_assert(kResponseGroup % kPanelNeurons == 0, "no block of neurons crosses groups");

struct MomentsScratch {
  float panel[kRowBlock + 2][kPanel];
  float centre[kMomentsTile];
  double sum[kMomentsTile], squares[kMomentsTile];  // of deviations
};

constexpr std::int64_t kMomentsScratchBytes = sizeof(MomentsScratch);

struct F32Features {
  using Element = float;
  static CL_INLINE vf load(const float* p) { return vload(p); }
};
struct F16Features {
  using Element = std::uint16_t;
  static CL_INLINE vf load(const std::uint16_t* p) { return vload_f16(p); }
};
struct BF16Features {
  using Element = std::uint16_t;
  static CL_INLINE vf load(const std::uint16_t* p) { return vload_bf16(p); }
};

// Vector v of a row of which `count` columns exist; zeros beyond.
template <class Source, bool kWhole>
CL_INLINE vf panel_load(const typename Source::Element* row, int v, std::int64_t count) {
  if (kWhole) return Source::load(row + v * kLanes);
  typename Source::Element part[kLanes] = {};
  const std::int64_t left = count - v * kLanes;
  const std::int64_t take = left < 0 ? 0 : left < kLanes ? left : kLanes;
  std::memcpy(part, row + v * kLanes, static_cast<std::size_t>(take) * sizeof(part[0]));
  return Source::load(part);
}

// Images of a panel, and its centre: their weighted mean.
template <class Source, bool kWhole>
CL_NOINLINE void take_panel(const typename Source::Element* features, std::int64_t columns, const float* weights,
                            int rows, std::int64_t count, float* centre, MomentsScratch* scratch) {
  vf sum[kPanelVectors];
  CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) sum[v] = vzero();
  float total = 0.0f;
  float* CL_RESTRICT panel = scratch->panel[0];
  for (int i = 0; i < rows; ++i) {
    const vf weight = vset1(weights[i]);
    total += weights[i];
    CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      const vf x = panel_load<Source, kWhole>(features + i * columns, v, count);
      vstore(panel + i * kPanel + v * kLanes, x);
      sum[v] = vfma(weight, x, sum[v]);
    }
  }
  if (total > 0.0f) {
    CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) vstore(centre + v * kLanes, sum[v]);
    for (int c = 0; c < kPanel; ++c) centre[c] = centre[c] / total;
  } else {  // images without weight: any of them will do
    std::memcpy(centre, panel, kPanel * sizeof(float));
  }
}

// Deviations from the centre, and their sums. `kTaken`: of what take_panel left in the panel, else of the features.
template <class Source, bool kWhole, bool kTaken>
CL_NOINLINE void centre_panel(const typename Source::Element* features, std::int64_t columns, const float* weights,
                              int rows, std::int64_t count, int column, MomentsScratch* scratch) {
  vf centre[kPanelVectors], sum[kPanelVectors], squares[kPanelVectors];
  CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    centre[v] = vload(scratch->centre + column + v * kLanes);
    sum[v] = squares[v] = vzero();
  }
  float* CL_RESTRICT panel = scratch->panel[0];
  for (int i = 0; i < rows; ++i) {
    const vf weight = vset1(weights[i]);
    CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      float* at = panel + i * kPanel + v * kLanes;
      const vf x = kTaken ? vload(at) : panel_load<Source, kWhole>(features + i * columns, v, count);
      const vf deviation = vsub(x, centre[v]);
      const vf weighted = vmul(weight, deviation);
      vstore(at, deviation);
      sum[v] = vadd(sum[v], weighted);
      squares[v] = vfma(weighted, deviation, squares[v]);
    }
  }
  float sums[2][kPanel];
  CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    vstore(sums[0] + v * kLanes, sum[v]);
    vstore(sums[1] + v * kLanes, squares[v]);
  }
  for (int c = 0; c < kPanel; ++c) {
    scratch->sum[column + c] += static_cast<double>(sums[0][c]);
    scratch->squares[column + c] += static_cast<double>(sums[1][c]);
  }
}

// The new means and sums of squares of `count` columns from `begin` on, and the two last rows of the panel.
CL_NOINLINE void merge_panel(const MomentsJob& job, std::int64_t begin, int rows, std::int64_t count, int column,
                             MomentsScratch* scratch) {
  const double batch = job.args.batch, share = batch / (job.args.before + batch), factor = job.args.before * share;
  double* CL_RESTRICT mean = job.args.mean + begin;
  double* CL_RESTRICT m2 = job.args.m2 + begin;
  const float* CL_RESTRICT centre = scratch->centre + column;
  const double* CL_RESTRICT sum = scratch->sum + column;
  const double* CL_RESTRICT squares = scratch->squares + column;
  float* CL_RESTRICT jump = scratch->panel[rows];
  float* CL_RESTRICT offset = scratch->panel[rows + 1];
  for (std::int64_t c = 0; c < count; ++c) {
    const double beside = sum[c] / batch;  // the batch's mean minus the centre
    const double d = (static_cast<double>(centre[c]) + beside) - mean[c];
    const double own = squares[c] - sum[c] * beside;
    m2[c] += (own > 0.0 ? own : 0.0) + factor * d * d;
    mean[c] += d * share;
    jump[c] = static_cast<float>(d);
    offset[c] = static_cast<float>(beside);
  }
  for (std::int64_t c = count; c < kPanel; ++c) jump[c] = offset[c] = 0.0f;
}

// Lines of memory that will be read soon, along one row after the other.
struct Ahead {
  const char* row;
  std::int64_t stride;  // bytes
  int lines;            // of each row
  int line;             // the next one
  std::int64_t left;    // lines in all

  CL_INLINE void ask() {
    prefetch(row + line * kCacheLine);
    if (++line == lines) {
      line = 0;
      row += stride;
    }
  }

  // How many to ask for now if all are to be asked for within `calls` calls.
  CL_INLINE int share(std::int64_t calls) {
    const std::int64_t now = (left + calls - 1) / calls;
    left -= now;
    return static_cast<int>(now);
  }
};

template <class Element>
CL_INLINE Ahead rows_ahead(const Element* first, std::int64_t rows, std::int64_t columns, std::int64_t count) {
  const auto bytes = static_cast<std::int64_t>(sizeof(Element));
  const std::int64_t lines = (count * bytes + kCacheLine - 1) / kCacheLine;
  return {reinterpret_cast<const char*>(first), columns * bytes, static_cast<int>(lines), 0, rows * lines};
}

struct ProductBlock {
  vf acc[kPanelNeurons][kPanelVectors];
  const float* a;      // [depth, kResponseGroup]
  const float* panel;  // [depth, kPanel]
};

CL_INLINE void product_step(ProductBlock& b) {
  vf row[kPanelVectors];
  CL_UNROLL for (int n = 0; n < kPanelVectors; ++n) {
    row[n] = vload(b.panel + n * kLanes);
    vkeep(row[n]);
  }
  CL_UNROLL for (int p = 0; p < kPanelNeurons; ++p) {
    const vf value = vset1(b.a[p]);
    CL_UNROLL for (int n = 0; n < kPanelVectors; ++n) b.acc[p][n] = vfma(value, row[n], b.acc[p][n]);
  }
  b.a += kResponseGroup;
  b.panel += kPanel;
}

// Ask for `lines` lines, one per step as long as there are steps. Returns the steps left.
CL_INLINE int steps_asking(Ahead& ahead, int lines, int steps, ProductBlock& b) {
  for (; lines > 0 && steps > 0; --lines, --steps) {
    ahead.ask();
    product_step(b);
  }
  for (; lines > 0; --lines) ahead.ask();
  return steps;
}

// out[p][c] += sum_i a[i][p] panel[i][c] for `neurons` of the kPanelNeurons rows of `out`.
CL_NOINLINE void product(const float* a, const float* panel, int depth, int neurons, float* out, std::int64_t columns,
                         Ahead* features, int feature_lines, Ahead* cross, int cross_lines) {
  ProductBlock b;
  CL_UNROLL for (int p = 0; p < kPanelNeurons; ++p) {
    CL_UNROLL for (int n = 0; n < kPanelVectors; ++n) b.acc[p][n] = vzero();
  }
  b.a = a;
  b.panel = panel;
  int steps = steps_asking(*features, feature_lines, depth, b);
  steps = steps_asking(*cross, cross_lines, steps, b);
  for (; steps > 0; --steps) product_step(b);
  CL_UNROLL for (int p = 0; p < kPanelNeurons; ++p) {
    if (p < neurons) {
      float* at = out + p * columns;
      CL_UNROLL for (int n = 0; n < kPanelVectors; ++n) {
        vstore(at + n * kLanes, vadd(vload(at + n * kLanes), b.acc[p][n]));
      }
    }
  }
}

// A panel of which `count` columns exist: through a copy.
CL_NOINLINE void partial_product(const float* a, const float* panel, int depth, int neurons, std::int64_t count,
                                 float* out, std::int64_t columns) {
  float copy[kPanelNeurons * kPanel] = {};
  for (int p = 0; p < neurons; ++p) {
    std::memcpy(copy + p * kPanel, out + p * columns, static_cast<std::size_t>(count) * sizeof(float));
  }
  Ahead none = {};
  product(a, panel, depth, neurons, copy, kPanel, &none, 0, &none, 0);
  for (int p = 0; p < neurons; ++p) {
    std::memcpy(out + p * columns, copy + p * kPanel, static_cast<std::size_t>(count) * sizeof(float));
  }
}

// One block of images of one tile: `count` columns from `begin` on.
template <class Source>
struct TileBlock {
  using Element = typename Source::Element;
  const MomentsJob& job;
  MomentsScratch* scratch;
  std::int64_t begin, count, first;
  int rows;
  bool last;
  Ahead features, cross;  // what the next block needs

  template <bool kWhole>
  CL_INLINE void panel(int column, std::int64_t width) {
    const FeatureMomentsArgs& a = job.args;
    const Element* from = static_cast<const Element*>(a.features) + first * a.columns + begin + column;
    const float* weights = job.weights + first;
    if (first == 0) {
      take_panel<Source, kWhole>(from, a.columns, weights, rows, width, scratch->centre + column, scratch);
      centre_panel<Source, kWhole, true>(from, a.columns, weights, rows, width, column, scratch);
    } else {
      centre_panel<Source, kWhole, false>(from, a.columns, weights, rows, width, column, scratch);
    }
    if (last) merge_panel(job, begin + column, rows, width, column, scratch);
    const int depth = last ? rows + 2 : rows;
    const std::int64_t blocks = (a.neurons + kPanelNeurons - 1) / kPanelNeurons;
    const std::int64_t calls = (count - column) / kPanel * blocks;  // to whole panels
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t neuron = block * kPanelNeurons, left = a.neurons - neuron;
      const float* responses =
          job.responses + (neuron / kResponseGroup * (a.images + 2) + first) * kResponseGroup + neuron % kResponseGroup;
      const int neurons = left < kPanelNeurons ? static_cast<int>(left) : kPanelNeurons;
      float* out = a.cross + neuron * a.columns + begin + column;
      if (kWhole) {
        const int feature_lines = features.share(calls - block), cross_lines = cross.share(calls - block);
        product(responses, scratch->panel[0], depth, neurons, out, a.columns, &features, feature_lines, &cross,
                cross_lines);
      } else {
        partial_product(responses, scratch->panel[0], depth, neurons, width, out, a.columns);
      }
    }
  }

  void run() {
    int column = 0;
    for (; column + kPanel <= count; column += kPanel) panel<true>(column, kPanel);
    if (column < count) panel<false>(column, count - column);
  }
};

template <class Source>
void moments_columns_of(const MomentsJob& job, std::int64_t begin, std::int64_t end, MomentsScratch* scratch) {
  const FeatureMomentsArgs& a = job.args;
  const auto* features = static_cast<const typename Source::Element*>(a.features);
  for (; begin < end; begin += kMomentsTile) {
    const std::int64_t rest = end - begin - kMomentsTile;  // columns behind this tile
    const std::int64_t next = rest <= 0 ? 0 : rest < kMomentsTile ? rest : kMomentsTile;
    const std::int64_t count = rest < 0 ? end - begin : kMomentsTile;
    std::memset(scratch->sum, 0, 2 * sizeof scratch->sum);
    for (std::int64_t first = 0; first < a.images; first += kRowBlock) {
      const std::int64_t left = a.images - first;
      const bool last = left <= kRowBlock;
      const std::int64_t rows = last ? left : kRowBlock;
      const std::int64_t rows_next = last ? a.images : left - kRowBlock;
      TileBlock<Source> block = {
          job,
          scratch,
          begin,
          count,
          first,
          static_cast<int>(rows),
          last,
          rows_ahead(last ? features + begin + kMomentsTile : features + (first + kRowBlock) * a.columns + begin,
                     rows_next < kRowBlock ? rows_next : kRowBlock, a.columns, last ? next : count),
          rows_ahead(a.cross + begin + kMomentsTile, a.neurons, a.columns, last ? next : 0)};
      block.run();
    }
  }
}

void moments_columns(const MomentsJob& job, std::int64_t begin, std::int64_t end, void* scratch) {
  MomentsScratch* own = static_cast<MomentsScratch*>(scratch);
  switch (job.args.type) {
    case FeatureType::f32: return moments_columns_of<F32Features>(job, begin, end, own);
    case FeatureType::f16: return moments_columns_of<F16Features>(job, begin, end, own);
    case FeatureType::bf16: return moments_columns_of<BF16Features>(job, begin, end, own);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
