// Running moments of features (formulas in cortexloop/moments.h), one panel of neighbouring columns after the other.
//
// A panel of up to kRowBlock images is read once: converted to floats and summed, centred at the mean of the first block and
// summed again (sums of deviations and of their squares, which also correct the centre), all in the first-level cache. Then
//
//   cross[t][c] += sum_i centred_i[t] (x_i[c] - centre[c]) + f shift[t] d[c] - (sum_i centred_i[t]) (xb[c] - centre[c])
//
// as one product of depth images + 2: blocks of P neurons x N vectors stay in registers, `cross` is read and written once per
// block of images. While a panel is multiplied, the features of the next one and the block of `cross` that comes next are on
// their way from memory.
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
constexpr int kRowBlock = 128;  // a panel of 48 columns is 25 KB and stays in the first-level cache
constexpr int kLine = 64;       // bytes
static_assert(kResponseGroup % kPanelNeurons == 0, "a block must not cross groups");

struct MomentsScratch {
  float panel[(kRowBlock + 2) * kPanel];
  float centre[kPanel];
  float sum[kPanel], squares[kPanel];               // of deviations, of one block of images
  double total_sum[kPanel], total_squares[kPanel];  // of all blocks
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

// The centre of a panel: the weighted mean of the first block of images. `panel` is left with the images as floats.
template <class Source, bool kWhole>
CL_NOINLINE void find_centre(const typename Source::Element* features, std::int64_t columns, const float* weights,
                             int rows, std::int64_t count, MomentsScratch* scratch) {
  vf sum[kPanelVectors];
  CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) sum[v] = vzero();
  float total = 0.0f;
  float* CL_RESTRICT panel = scratch->panel;
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
    CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) vstore(scratch->centre + v * kLanes, sum[v]);
    for (int c = 0; c < kPanel; ++c) scratch->centre[c] = scratch->centre[c] / total;
  } else {  // images without weight: any of them will do
    std::memcpy(scratch->centre, panel, sizeof scratch->centre);
  }
}

// Deviations from the centre, and their sums. `kFirst`: of what find_centre left in the panel, else of the features.
template <class Source, bool kWhole, bool kFirst>
CL_NOINLINE void centre_panel(const typename Source::Element* features, std::int64_t columns, const float* weights,
                              int rows, std::int64_t count, MomentsScratch* scratch) {
  vf centre[kPanelVectors], sum[kPanelVectors], squares[kPanelVectors];
  CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    centre[v] = vload(scratch->centre + v * kLanes);
    sum[v] = squares[v] = vzero();
  }
  float* CL_RESTRICT panel = scratch->panel;
  for (int i = 0; i < rows; ++i) {
    const vf weight = vset1(weights[i]);
    CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      float* at = panel + i * kPanel + v * kLanes;
      const vf x = kFirst ? vload(at) : panel_load<Source, kWhole>(features + i * columns, v, count);
      const vf deviation = vsub(x, centre[v]);
      const vf weighted = vmul(weight, deviation);
      vstore(at, deviation);
      sum[v] = vadd(sum[v], weighted);
      squares[v] = vfma(weighted, deviation, squares[v]);
    }
  }
  CL_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    vstore(scratch->sum + v * kLanes, sum[v]);
    vstore(scratch->squares + v * kLanes, squares[v]);
  }
  for (int c = 0; c < kPanel; ++c) {
    scratch->total_sum[c] += static_cast<double>(scratch->sum[c]);
    scratch->total_squares[c] += static_cast<double>(scratch->squares[c]);
  }
}

// The new means and sums of squares; the two last rows of the panel.
CL_NOINLINE void merge_panel(const MomentsJob& job, std::int64_t begin, int rows, std::int64_t count,
                             MomentsScratch* scratch) {
  const double batch = job.args.batch, share = batch / (job.args.before + batch), factor = job.args.before * share;
  double* CL_RESTRICT mean = job.args.mean + begin;
  double* CL_RESTRICT m2 = job.args.m2 + begin;
  float* CL_RESTRICT jump = scratch->panel + rows * kPanel;
  float* CL_RESTRICT offset = jump + kPanel;
  std::memset(jump, 0, 2 * kPanel * sizeof(float));
  for (std::int64_t c = 0; c < count; ++c) {
    const double beside = scratch->total_sum[c] / batch;  // the batch's mean minus the centre
    const double d = (static_cast<double>(scratch->centre[c]) + beside) - mean[c];
    const double own = scratch->total_squares[c] - scratch->total_sum[c] * beside;
    m2[c] += (own > 0.0 ? own : 0.0) + factor * d * d;
    mean[c] += d * share;
    jump[c] = static_cast<float>(d);
    offset[c] = static_cast<float>(beside);
  }
}

// Rows of memory that will be read soon, of which a panel's width each is asked for, one line per step of a product: all at once
// would wait for one another, and a hardware prefetcher does not follow as many rows.
struct Ahead {
  const char* next;
  std::int64_t stride;  // bytes from row to row
  int rows;

  CL_INLINE void line(int l) const {
    prefetch(next + (l + 1) * kLine - 1);
  }  // the first line came with the panel before
};

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

// As many of the rows ahead as there are steps left for; the others are asked for at once. Returns the steps left.
template <int kLines>
CL_INLINE int steps_with(Ahead ahead, int steps, ProductBlock& b) {
  for (; ahead.rows > 0 && steps >= kLines; --ahead.rows, ahead.next += ahead.stride, steps -= kLines) {
    CL_UNROLL for (int l = 0; l < kLines; ++l) {
      ahead.line(l);
      product_step(b);
    }
  }
  for (; ahead.rows > 0; --ahead.rows, ahead.next += ahead.stride) {
    CL_UNROLL for (int l = 0; l < kLines; ++l) ahead.line(l);
  }
  return steps;
}

constexpr int kCrossLines = (kPanel * static_cast<int>(sizeof(float)) + kLine - 1) / kLine;

// out[p][c] += sum_i a[i][p] panel[i][c] for `neurons` of the kPanelNeurons rows of `out`.
template <int kFeatureLines>
CL_NOINLINE void product(const float* a, const float* panel, int depth, int neurons, float* out, std::int64_t columns,
                         const Ahead& cross, const Ahead& features) {
  ProductBlock b;
  CL_UNROLL for (int p = 0; p < kPanelNeurons; ++p) {
    CL_UNROLL for (int n = 0; n < kPanelVectors; ++n) b.acc[p][n] = vzero();
  }
  b.a = a;
  b.panel = panel;
  int steps = depth;
  steps = steps_with<kCrossLines>(cross, steps, b);
  steps = steps_with<kFeatureLines>(features, steps, b);
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

// A panel with fewer columns than lanes: through a copy.
template <int kFeatureLines>
CL_NOINLINE void partial_product(const float* a, const float* panel, int depth, int neurons, std::int64_t count,
                                 float* out, std::int64_t columns) {
  float copy[kPanelNeurons * kPanel] = {};
  for (int p = 0; p < neurons; ++p) {
    std::memcpy(copy + p * kPanel, out + p * columns, static_cast<std::size_t>(count) * sizeof(float));
  }
  const Ahead none = {nullptr, 0, 0};
  product<kFeatureLines>(a, panel, depth, neurons, copy, kPanel, none, none);
  for (int p = 0; p < neurons; ++p) {
    std::memcpy(out + p * columns, copy + p * kPanel, static_cast<std::size_t>(count) * sizeof(float));
  }
}

// The product of a block of images with all neurons; meanwhile `ahead`, the images of a panel to come, is fetched.
template <int kFeatureLines>
CL_INLINE void multiply_panel(const MomentsJob& job, std::int64_t begin, std::int64_t count, std::int64_t first_row,
                              int depth, Ahead ahead, bool more_columns, const MomentsScratch* scratch) {
  const FeatureMomentsArgs& a = job.args;
  const std::int64_t blocks = (a.neurons + kPanelNeurons - 1) / kPanelNeurons;
  const std::int64_t row_bytes = a.columns * static_cast<std::int64_t>(sizeof(float));
  const int ahead_rows = ahead.rows;
  int fetched = 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t neuron = block * kPanelNeurons;
    const std::int64_t group = neuron / kResponseGroup;
    const float* responses =
        job.responses + (group * (a.images + 2) + first_row) * kResponseGroup + neuron % kResponseGroup;
    const std::int64_t left = a.neurons - neuron;
    const int neurons = left < kPanelNeurons ? static_cast<int>(left) : kPanelNeurons;
    float* out = a.cross + neuron * a.columns + begin;
    if (count != kPanel) {
      partial_product<kFeatureLines>(responses, scratch->panel, depth, neurons, count, out, a.columns);
      continue;
    }
    // Of `cross` the next block, or the first one of the next panel.
    const bool wraps = left <= kPanelNeurons;
    const std::int64_t rows_left = wraps ? (more_columns ? a.neurons : 0) : left - kPanelNeurons;
    const float* next = wraps ? a.cross + begin + kPanel : out + kPanelNeurons * a.columns;
    const Ahead cross = {reinterpret_cast<const char*>(next), row_bytes,
                         rows_left < kPanelNeurons ? static_cast<int>(rows_left) : kPanelNeurons};
    const int until = static_cast<int>((block + 1) * ahead_rows / blocks);
    ahead.rows = until - fetched;
    product<kFeatureLines>(responses, scratch->panel, depth, neurons, out, a.columns, cross, ahead);
    ahead.next += ahead.rows * ahead.stride;
    fetched = until;
  }
}

template <class Source, bool kWhole>
CL_INLINE void one_panel(const MomentsJob& job, std::int64_t begin, std::int64_t count, std::int64_t end,
                         MomentsScratch* scratch) {
  using Element = typename Source::Element;
  constexpr int kLines = (kPanel * static_cast<int>(sizeof(Element)) + kLine - 1) / kLine;
  const FeatureMomentsArgs& a = job.args;
  const Element* features = static_cast<const Element*>(a.features) + begin;
  std::memset(scratch->total_sum, 0, 2 * sizeof scratch->total_sum);
  for (std::int64_t first = 0; first < a.images; first += kRowBlock) {
    const std::int64_t left = a.images - first;
    const bool last = left <= kRowBlock;
    const int rows = last ? static_cast<int>(left) : kRowBlock;
    const Element* here = features + first * a.columns;
    if (first == 0) {
      find_centre<Source, kWhole>(here, a.columns, job.weights, rows, count, scratch);
      centre_panel<Source, kWhole, true>(here, a.columns, job.weights, rows, count, scratch);
    } else {
      centre_panel<Source, kWhole, false>(here, a.columns, job.weights + first, rows, count, scratch);
    }
    if (last) merge_panel(job, begin, rows, count, scratch);
    // What will be read next: the next block of images, or the first one of the next panel.
    const bool more_columns = begin + 2 * kPanel <= end;
    const std::int64_t ahead_left = !last ? left - kRowBlock : more_columns ? a.images : 0;
    const Ahead ahead = {reinterpret_cast<const char*>(last ? features + kPanel : here + kRowBlock * a.columns),
                         a.columns * static_cast<std::int64_t>(sizeof(Element)),
                         ahead_left < kRowBlock ? static_cast<int>(ahead_left) : kRowBlock};
    multiply_panel<kLines>(job, begin, count, first, last ? rows + 2 : rows, ahead, more_columns, scratch);
  }
}

template <class Source>
void moments_columns_of(const MomentsJob& job, std::int64_t begin, std::int64_t end, MomentsScratch* scratch) {
  for (; begin + kPanel <= end; begin += kPanel) one_panel<Source, true>(job, begin, kPanel, end, scratch);
  if (begin < end) one_panel<Source, false>(job, begin, end - begin, end, scratch);
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
