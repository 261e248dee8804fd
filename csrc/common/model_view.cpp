#include "model_view.h"

#include <cstdio>

namespace cortexloop {
namespace {

std::string sentence(const char* format, long long a, long long b = 0) {
  char text[256];
  std::snprintf(text, sizeof text, format, a, b);
  return text;
}

std::int64_t padded(std::int64_t channels) {
  return (channels + kPaddedChannels - 1) / kPaddedChannels * kPaddedChannels;
}

// Checks sections against the buffer and remembers whether one did not fit. Without a buffer only sizes are checked.
struct Sections {
  const BankView& bank;
  bool ok = true;
  const float* at(std::int64_t offset, std::int64_t floats) {
    if (offset < 0 || floats < 0 || offset > bank.weights_size - floats) {
      ok = false;
      return nullptr;
    }
    return bank.weights == nullptr ? nullptr : bank.weights + offset;
  }
};

}  // namespace

std::string resolve_model(const BankView& bank, std::int64_t model, ModelView* view) {
  if (bank.table_stride < kModelFields + kLayerFields)
    return sentence("a table row has %lld columns, too few", bank.table_stride);
  const std::int64_t* row = bank.table + model * bank.table_stride;
  const std::int64_t depth = row[kDepth];
  if (depth > kMaxDepth) {
    return sentence("model %lld has more layers than the kernels take (%lld)", model, kMaxDepth);
  }
  if (depth < 1 || kModelFields + depth * kLayerFields > bank.table_stride) {
    return sentence("model %lld has %lld layers, which its table row cannot hold", model, depth);
  }
  Sections sections{bank};
  std::int64_t height = row[kHeight], width = row[kWidth], channels = 3;
  constexpr std::int64_t kMaxSize = 16384;
  if (height < 1 || width < 1 || height > kMaxSize || width > kMaxSize) {
    return sentence("images of %lld x %lld pixels are outside what the kernels take", height, width);
  }
  view->depth = static_cast<std::int32_t>(depth);
  for (std::int64_t l = 0; l < depth; ++l) {
    const std::int64_t* f = row + kModelFields + l * kLayerFields;
    const std::int64_t k = f[kKernelSize], stride = f[kStride], out_c = f[kOutChannels];
    if (k != 1 && k != 3 && k != 5 && k != 7) return sentence("model %lld has a kernel of size %lld", model, k);
    if (stride != 1 && stride != 2) return sentence("model %lld has a stride of %lld", model, stride);
    if (f[kInChannels] != channels || out_c < 1)
      return sentence("layer %lld of model %lld has wrong channel counts", l, model);
    if (out_c > kMaxChannels) {
      return sentence("model %lld has a layer of more channels than the kernels take (%lld)", model, kMaxChannels);
    }
    const auto same = [&](std::int64_t in, std::int64_t out, std::int64_t pad) {
      if (out != (in + stride - 1) / stride) return false;
      const std::int64_t total = (out - 1) * stride + k - in;
      return pad == (total > 0 ? total / 2 : 0);
    };
    if (!same(height, f[kOutHeight], f[kPadTop]) || !same(width, f[kOutWidth], f[kPadLeft])) {
      return sentence("layer %lld of model %lld does not have \"same\" padding", l, model);
    }
    LayerView& layer = view->layers[l];
    const std::int64_t in_p = padded(channels), out_p = padded(out_c), taps_p = padded(k * 3);
    layer.kernel = static_cast<std::int32_t>(k);
    layer.stride = static_cast<std::int32_t>(stride);
    layer.in_c = static_cast<std::int32_t>(channels);
    layer.out_c = static_cast<std::int32_t>(out_c);
    layer.in_p = static_cast<std::int32_t>(in_p);
    layer.out_p = static_cast<std::int32_t>(out_p);
    layer.in_h = static_cast<std::int32_t>(height);
    layer.in_w = static_cast<std::int32_t>(width);
    layer.out_h = static_cast<std::int32_t>(f[kOutHeight]);
    layer.out_w = static_cast<std::int32_t>(f[kOutWidth]);
    layer.pad_top = static_cast<std::int32_t>(f[kPadTop]);
    layer.pad_left = static_cast<std::int32_t>(f[kPadLeft]);
    layer.bias = sections.at(f[kBias], out_p);
    layer.pointwise = nullptr;
    layer.transposed = nullptr;
    layer.winograd = nullptr;
    layer.winograd_transposed = nullptr;
    layer.pairs = nullptr;
    layer.pixel_pairs = nullptr;
    if (l == 0) {
      layer.spatial = sections.at(f[kSpatial], k * k * 3 * out_p);
      if (f[kWinograd] < 0) {
        layer.transposed = sections.at(f[kTransposed], out_c * k * taps_p);
      } else {
        if (k != 5 || stride != 1) return sentence("layer %lld of model %lld cannot have a Winograd kernel", l, model);
        layer.winograd = sections.at(f[kWinograd], 8 * 6 * 3 * out_p);
        layer.winograd_transposed = sections.at(f[kWinogradTransposed], 8 * out_c * 16);
      }
    } else {
      layer.spatial = sections.at(f[kSpatial], k * k * in_p);
      layer.pointwise = sections.at(f[kPointwise], channels * out_p);
      layer.transposed = sections.at(f[kTransposed], out_c * in_p);
      layer.pairs = sections.at(f[kPairs], (channels + 1) / 2 * out_p);
      if (stride == 2) layer.pixel_pairs = sections.at(f[kPixelPairs], k * ((k + 1) / 2) * in_p);
    }
    if (!sections.ok)
      return sentence("a section of layer %lld of model %lld lies outside the packed weights", l, model);
    height = f[kOutHeight];
    width = f[kOutWidth];
    channels = out_c;
  }
  view->readout = sections.at(row[kReadout], height * width * padded(channels));
  const float* bias = sections.at(row[kReadoutBias], 1);
  if (!sections.ok) return sentence("the readout of model %lld lies outside the packed weights", model);
  view->readout_bias = bias == nullptr ? 0.0f : *bias;
  return "";
}

}  // namespace cortexloop
