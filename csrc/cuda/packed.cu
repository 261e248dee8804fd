// Packs a bank for the kernels: plain sections for layers one at a time, and for models of the published form the head's
// fragments, taps and scales. Host code only.
#include "packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../common/model_view.h"
#include "head_back.h"
#include "layers.h"

namespace cortexloop::cuda {
namespace {

constexpr double kLargestExactLevel = 2048 - 255;  // levels minus the rounded mean are exact as halves
constexpr std::int64_t kLargestMap = 1 << 30;      // numbers; positions in a map are 32-bit
constexpr int kWeightBound = 8;                    // scaled weights stay below 2^8

// Grows by sections aligned to 16 bytes.
class Bytes {
 public:
  explicit Bytes(std::vector<unsigned char>* bytes) : bytes_(bytes) {}

  template <class T>
  std::int64_t add(const std::vector<T>& values) {
    const std::size_t start = (bytes_->size() + 15) / 16 * 16;
    bytes_->resize(start + values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(bytes_->data() + start, values.data(), values.size() * sizeof(T));
    return static_cast<std::int64_t>(start);
  }

 private:
  std::vector<unsigned char>* bytes_;
};

// [rows, columns], row by row.
struct Matrix {
  int rows, columns;
  std::vector<double> values;

  Matrix(int r, int c) : rows(r), columns(c), values(static_cast<std::size_t>(r) * static_cast<std::size_t>(c)) {}
  double& at(int r, int c) {
    return values[static_cast<std::size_t>(r) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(c)];
  }
  double at(int r, int c) const {
    return values[static_cast<std::size_t>(r) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(c)];
  }
};

// The power of two by which numbers of at most `largest` stay below 2^bound.
double scale_below(double largest, int bound) {
  if (largest == 0.0) return 1.0;
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0, bound - exponent);
}

double largest_of(const std::vector<double>& values) {
  return values.empty() ? 0.0 : *std::max_element(values.begin(), values.end());
}

// For each pair of columns their two scales, then what is added to them; zeros behind the real columns.
std::int64_t add_outputs(Bytes& bytes, const std::vector<double>& scales, const std::vector<double>& added,
                         int n_tiles) {
  std::vector<float> out(static_cast<std::size_t>(n_tiles) * 16, 0.0f);
  for (std::size_t n = 0; n < scales.size(); ++n) {
    out[n / 2 * 4 + n % 2] = static_cast<float>(scales[n]);
    if (n < added.size()) out[n / 2 * 4 + 2 + n % 2] = static_cast<float>(added[n]);
  }
  return bytes.add(out);
}

std::vector<double> times(std::vector<double> values, double factor) {
  for (double& x : values) x *= factor;
  return values;
}

// A matrix whose operands come multiplied by `operand_scale` and whose results, with `bias`, are wanted multiplied by
// `result_scale`. Every column of fragments has a scale of its own, or all have the same one. `scales` gets those of the
// sums.
MatrixRecord add_matrix(Bytes& bytes, const Matrix& w, double operand_scale, double result_scale,
                        const std::vector<double>& bias, bool same_scale = false,
                        std::vector<double>* scales = nullptr) {
  MatrixRecord record;
  record.k_tiles = ceil_div(w.rows, 16);
  record.n_tiles = ceil_div(w.columns, 8);
  std::vector<double> weight_scale(static_cast<std::size_t>(w.columns), 1.0), scale(weight_scale);
  for (int n = 0; n < w.columns; ++n) {
    double largest = 0.0;
    for (int k = 0; k < w.rows; ++k) largest = std::max(largest, std::fabs(w.at(k, n)));
    if (same_scale) {
      for (const double x : w.values) largest = std::max(largest, std::fabs(x));
    }
    const auto i = static_cast<std::size_t>(n);
    weight_scale[i] = scale_below(largest, kWeightBound);
    scale[i] = result_scale / (operand_scale * weight_scale[i]);
  }
  std::vector<__half> fragments;
  fragments.reserve(static_cast<std::size_t>(2 * record.n_tiles * record.k_tiles) * 128);
  for (int plane = 0; plane < 2; ++plane) {
    for (int tile = 0; tile < record.n_tiles; ++tile) {
      for (int k_tile = 0; k_tile < record.k_tiles; ++k_tile) {
        for (int lane = 0; lane < 32; ++lane) {
          const int n = tile * 8 + lane / 4;
          for (int e = 0; e < 4; ++e) {  // register e / 2, half e % 2
            const int k = k_tile * 16 + 2 * (lane % 4) + 8 * (e / 2) + e % 2;
            float value = 0.0f;
            if (k < w.rows && n < w.columns) {
              value = static_cast<float>(w.at(k, n) * weight_scale[static_cast<std::size_t>(n)]);
            }
            const __half high = __float2half_rn(value);
            fragments.push_back(plane == 0 ? high : __float2half_rn(value - __half2float(high)));
          }
        }
      }
    }
  }
  record.fragments = bytes.add(fragments);
  record.outputs = add_outputs(bytes, scale, times(bias, result_scale), record.n_tiles);
  if (scales != nullptr) *scales = scale;
  return record;
}

// taps: [25][channels]
TapsRecord add_taps(Bytes& bytes, const Matrix& taps, int used, int pairs, double scale) {
  TapsRecord record;
  record.pairs = used;
  record.unscale = static_cast<float>(1.0 / scale);
  std::vector<float> floats(static_cast<std::size_t>(taps.rows * pairs) * 2, 0.0f);
  for (int tap = 0; tap < taps.rows; ++tap) {
    for (int c = 0; c < taps.columns; ++c) {
      floats[static_cast<std::size_t>(tap * 2 * pairs + c)] = static_cast<float>(taps.at(tap, c) * scale);
    }
  }
  std::vector<__half> halves(floats.size());
  std::transform(floats.begin(), floats.end(), halves.begin(), [](float x) { return __float2half_rn(x); });
  record.floats = bytes.add(floats);
  record.halves = bytes.add(halves);
  return record;
}

// Upper bounds of what a layer's outputs can be, from those of its inputs.
std::vector<double> depthwise_bound(const Matrix& taps, const std::vector<double>& in) {
  std::vector<double> out(in.size(), 0.0);
  for (int c = 0; c < taps.columns; ++c) {
    for (int tap = 0; tap < taps.rows; ++tap) {
      out[static_cast<std::size_t>(c)] += std::fabs(taps.at(tap, c)) * in[static_cast<std::size_t>(c)];
    }
  }
  return out;
}

std::vector<double> product_bound(const Matrix& w, const std::vector<double>& in, const std::vector<double>& bias) {
  std::vector<double> out(bias);
  for (double& x : out) x = std::fabs(x);
  for (int k = 0; k < w.rows; ++k) {
    for (int n = 0; n < w.columns; ++n) {
      out[static_cast<std::size_t>(n)] += std::fabs(w.at(k, n)) * in[static_cast<std::size_t>(k)];
    }
  }
  return out;
}

Matrix transposed(const Matrix& w) {
  Matrix t(w.columns, w.rows);
  for (int r = 0; r < w.rows; ++r) {
    for (int c = 0; c < w.columns; ++c) t.at(c, r) = w.at(r, c);
  }
  return t;
}

Matrix taps_of(const LayerView& layer) {
  Matrix taps(layer.kernel * layer.kernel, layer.in_c);
  for (int tap = 0; tap < taps.rows; ++tap) {
    for (int c = 0; c < layer.in_c; ++c) taps.at(tap, c) = layer.spatial[tap * layer.in_p + c];
  }
  return taps;
}

Matrix mixing_of(const LayerView& layer) {
  Matrix w(layer.in_c, layer.out_c);
  for (int c = 0; c < w.rows; ++c) {
    for (int o = 0; o < w.columns; ++o) w.at(c, o) = layer.pointwise[c * layer.out_p + o];
  }
  return w;
}

std::vector<double> bias_of(const LayerView& layer) { return {layer.bias, layer.bias + layer.out_c}; }

// Whether layers, sizes and channels are those of a head.
bool published_form(const ModelView& model) {
  if (model.depth < kAfterHead) return false;
  for (int l = 0; l < kAfterHead; ++l) {
    const LayerView& layer = model.layers[l];
    if (layer.kernel != kFirstKernel || layer.stride != (l == 0 ? 1 : 2)) return false;
  }
  const LayerView& first = model.layers[0];
  // Sizes of which every quarter is whole: paddings are then 2, 1 and 1 before.
  return first.in_h % 4 == 0 && first.in_w % 4 == 0 && first.in_w <= kMaxWidth &&
         ceil_div(first.out_c, 16) * 8 <= kMaxPairs1 && ceil_div(model.layers[1].out_c, 16) * 8 <= kMaxPairs2;
}

// False if the image mean or the weights do not allow a head after all.
bool add_head(Bytes& bytes, const ModelView& model, const float* mean, HeadRecord* head) {
  const LayerView &first = model.layers[0], &second = model.layers[1], &third = model.layers[2];
  head->channels0 = first.out_c;
  head->channels1 = second.out_c;
  head->channels2 = third.out_c;
  head->first.n_tiles = ceil_div(first.out_c, 8);
  head->mix1.k_tiles = ceil_div(first.out_c, 16);
  head->mix1.n_tiles = ceil_div(second.out_c, 8);
  head->mix2.k_tiles = ceil_div(second.out_c, 16);
  head->taps1.pairs = 8 * head->mix1.k_tiles;
  head->taps2.pairs = 8 * head->mix2.k_tiles;
  for (int c = 0; c < 3; ++c) {
    if (!(std::fabs(std::rint(mean[c])) <= kLargestExactLevel)) return false;
  }

  Matrix kernel(80, first.out_c), kernel_back(first.out_c, 80);
  std::vector<double> bias0 = bias_of(first), bias0_u8 = bias0;
  for (int dy = 0; dy < 5; ++dy) {
    for (int dx = 0; dx < 5; ++dx) {
      for (int c = 0; c < 3; ++c) {
        for (int o = 0; o < first.out_c; ++o) {
          const double w = first.spatial[((dy * 5 + dx) * 3 + c) * first.out_p + o];
          kernel.at(dy * 16 + dx * 3 + c, o) = w;
          kernel_back.at(o, dy * 16 + dx * 3 + c) = w;
          const double level = mean[c];
          bias0_u8[static_cast<std::size_t>(o)] -= w * (level - std::rint(level));
        }
      }
    }
  }
  const Matrix taps1 = taps_of(second), taps2 = taps_of(third), mixing1 = mixing_of(second), mixing2 = mixing_of(third);
  const std::vector<double> pixels(80, static_cast<double>(kLargestPixel));
  const std::vector<double> map0 = product_bound(kernel, pixels, bias0), between1 = depthwise_bound(taps1, map0);
  const std::vector<double> map1 = product_bound(mixing1, between1, bias_of(second));
  const std::vector<double> between2 = depthwise_bound(taps2, map1);
  const std::vector<double> none1(static_cast<std::size_t>(second.out_c)), none0(static_cast<std::size_t>(first.out_c));
  const std::vector<double> grad2(static_cast<std::size_t>(third.out_c), 1.0);
  const std::vector<double> grad1 = depthwise_bound(taps2, product_bound(transposed(mixing2), grad2, none1));
  const std::vector<double> grad0 = depthwise_bound(taps1, product_bound(transposed(mixing1), grad1, none0));
  for (const double bound : {largest_of(between2), largest_of(map1), largest_of(map0), largest_of(grad0)}) {
    if (!(bound < 1e30)) return false;  // also NaN
  }

  const double scale0 = scale_below(largest_of(map0), kHalfBound);
  const double scale_between1 = scale_below(largest_of(between1), kHalfBound);
  const double scale1 = scale_below(largest_of(map1), kHalfBound);
  const double scale_between2 = scale_below(largest_of(between2), kHalfBound);
  std::vector<double> first_scales;
  head->first = add_matrix(bytes, kernel, 1.0, scale0, bias0, false, &first_scales);
  head->first_u8 = add_outputs(bytes, first_scales, times(bias0_u8, scale0), head->first.n_tiles);
  head->taps1 = add_taps(bytes, taps1, head->taps1.pairs, kMaxPairs1, scale_between1 / scale0);
  head->mix1 = add_matrix(bytes, mixing1, scale_between1, scale1, bias_of(second));
  head->taps2 = add_taps(bytes, taps2, head->taps2.pairs, kMaxPairs2, scale_between2 / scale1);
  head->mix2 = add_matrix(bytes, mixing2, scale_between2, 1.0, bias_of(third));
  head->mix1_back = add_matrix(bytes, transposed(mixing1), 1.0, 1.0, {});
  head->first_back = add_matrix(bytes, kernel_back, 1.0, 1.0, {}, true);
  std::vector<float> back(static_cast<std::size_t>(third.out_c * 2 * kMaxPairs2), 0.0f);
  for (int o = 0; o < third.out_c; ++o) {
    for (int c = 0; c < second.out_c; ++c) {
      back[static_cast<std::size_t>(o * 2 * kMaxPairs2 + c)] = static_cast<float>(mixing2.at(c, o));
    }
  }
  head->mix2_back = bytes.add(back);
  head->largest1 = static_cast<float>(largest_of(grad1));
  head->largest0 = static_cast<float>(largest_of(grad0));
  return true;
}

// Rows of `width` numbers, `stride` apart, without the padding between them.
std::int64_t add_rows(Bytes& bytes, const float* from, std::int64_t rows, int width, int stride) {
  std::vector<float> dense;
  dense.reserve(static_cast<std::size_t>(rows * width));
  for (std::int64_t r = 0; r < rows; ++r) dense.insert(dense.end(), from + r * stride, from + r * stride + width);
  return bytes.add(dense);
}

LayerRecord shape_of(const LayerView& view) {
  LayerRecord record = {};
  record.kernel = view.kernel;
  record.stride = view.stride;
  record.pad_top = view.pad_top;
  record.pad_left = view.pad_left;
  record.in_c = view.in_c;
  record.in_h = view.in_h;
  record.in_w = view.in_w;
  record.out_c = view.out_c;
  record.out_h = view.out_h;
  record.out_w = view.out_w;
  return record;
}

LayerRecord add_layer(Bytes& bytes, const LayerView& view, bool first) {
  LayerRecord record = shape_of(view);
  const int taps = view.kernel * view.kernel;
  record.bias = add_rows(bytes, view.bias, 1, view.out_c, view.out_p);
  if (first) {
    record.spatial = add_rows(bytes, view.spatial, taps * 3, view.out_c, view.out_p);
  } else {
    record.spatial = add_rows(bytes, view.spatial, taps, view.in_c, view.in_p);
    record.pointwise = add_rows(bytes, view.pointwise, view.in_c, view.out_c, view.out_p);
  }
  return record;
}

// Places the maps of layers begin .. depth - 1.
void lay_out_rest(int begin, ModelRecord* model) {
  RestRecord& rest = model->rest;
  rest.begin = begin;
  std::int64_t between = 0, map = out_floats(model->layers[model->depth - 1]);
  for (int l = begin; l < model->depth; ++l) {
    LayerRecord& layer = model->layers[l];
    layer.rest = rest.between;
    rest.between += out_floats(layer);
    between = std::max(between, depthwise_floats(layer));
    map = std::max({map, in_floats(layer), out_floats(layer)});
  }
  rest.floats = rest.between + between;
  rest.gradients[0] = rest.floats;
  rest.gradients[1] = rest.floats + map;
  rest.gradient_floats = rest.floats + 2 * map;
}

}  // namespace

std::string describe_bank(const BankView& host, int* heads) {
  *heads = 0;
  if (host.n_models < 1 || host.weights_size < 3) return "the bank is empty";
  for (std::int64_t m = 0; m < host.n_models; ++m) {
    ModelView view;
    const std::string reason = resolve_model(host, m, &view);
    if (!reason.empty()) return reason;
    for (int l = 0; l < view.depth; ++l) {
      const LayerRecord layer = shape_of(view.layers[l]);
      if (std::max({in_floats(layer), out_floats(layer), depthwise_floats(layer)}) > kLargestMap) {
        return "model " + std::to_string(m) +
               " has a map of more than 2^30 numbers, which the CUDA kernels do not take";
      }
    }
    if (published_form(view)) ++*heads;
  }
  return "";
}

Status pack_bank(const BankView& host, PackedBank* packed) {
  int heads = 0;
  const std::string unsupported = describe_bank(host, &heads);
  if (!unsupported.empty()) return fail(Status::invalid_argument, "%s", unsupported.c_str());
  packed->bytes.assign(sizeof(PackedHeader), 0);
  Bytes bytes(&packed->bytes);
  std::vector<std::int64_t> cost;
  for (std::int64_t m = 0; m < host.n_models; ++m) {
    ModelView view;
    resolve_model(host, m, &view);
    ModelRecord record = {};
    record.depth = view.depth;
    record.height = view.layers[0].in_h;
    record.width = view.layers[0].in_w;
    if (m > 0 && (record.height != packed->models[0].height || record.width != packed->models[0].width)) {
      return fail(Status::invalid_argument, "model %lld takes images of another size than model 0",
                  static_cast<long long>(m));
    }
    const bool head = published_form(view) && add_head(bytes, view, host.weights, &record.head);
    record.has_head = head ? 1 : 0;
    for (int l = 0; l < view.depth; ++l) record.layers[l] = add_layer(bytes, view.layers[l], l == 0);
    lay_out_rest(head ? kAfterHead : 1, &record);
    const LayerView& last = view.layers[view.depth - 1];
    record.readout =
        add_rows(bytes, view.readout, static_cast<std::int64_t>(last.out_h) * last.out_w, last.out_c, last.out_p);
    record.readout_bias = view.readout_bias;
    packed->models.push_back(record);
    (head ? packed->heads : packed->plains).push_back(static_cast<std::int32_t>(m));
    cost.push_back(host.table[m * host.table_stride + kCost]);
  }
  std::vector<std::int32_t> slots(packed->models.size());
  for (std::vector<std::int32_t>* order : {&packed->heads, &packed->plains}) {
    std::stable_sort(order->begin(), order->end(), [&](std::int32_t a, std::int32_t b) {
      return cost[static_cast<std::size_t>(a)] > cost[static_cast<std::size_t>(b)];
    });
    for (std::size_t i = 0; i < order->size(); ++i) {
      const auto place = static_cast<std::int32_t>(i);
      slots[static_cast<std::size_t>((*order)[i])] = order == &packed->heads ? place : -1 - place;
    }
  }
  PackedHeader header = {};
  header.n_models = static_cast<std::int32_t>(host.n_models);
  std::copy(host.weights, host.weights + 3, header.mean);
  header.models = bytes.add(packed->models);
  header.head_order = bytes.add(packed->heads);
  header.plain_order = bytes.add(packed->plains);
  header.slots = bytes.add(slots);
  std::memcpy(packed->bytes.data(), &header, sizeof header);
  return Status::ok;
}

}  // namespace cortexloop::cuda
