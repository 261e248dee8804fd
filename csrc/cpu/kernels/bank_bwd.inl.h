// Gradient of one compact model's response with respect to one image, scaled by the cotangent.
//
//   d z_L = cotangent * readout * (a_L > 0);   d a_(l-1) = depthwise^T( pointwise^T d z_l );   d z_l = d a_l * (a_l > 0)
//   d image[y, x, c] = sum_ij,k d z_0[y + pad - i, x + pad - j, k] * w[i, j, c, k]
//
// Work:   one call = one (image, model): the fused forward pass, which leaves one bit per activation, then the gradient.
//         Those bits are all that the gradient needs of the image, so another readout of the same layers reuses them.
// Memory: as forward, rows stream: each layer keeps only the rows of pointwise^T d z that the next transpose reads.
// First layer: Winograd along rows where the kernel is 5 x 5 with stride 1 (see winograd.inl.h). Otherwise a product of each
//         d z_0 row with all taps of all colours, [out_w, k, taps_p], then a gather of the k x k neighbours. Both keep the
//         48 -> 3 channel product in full vectors.
#pragma once

#include "bank_fwd.inl.h"

namespace cortexloop {
namespace cpu {
namespace {

struct Backward {
  Forward forward;
  float cotangent;
  Ring rings[kMaxDepth];  // [1..]: pointwise^T d z of each layer
  std::int32_t next[kMaxDepth];
  float* d_z[kMaxDepth];  // [out_w, out_p] of the row at work
  WinogradGradientArgs
      winograd;        // buffers of a Winograd first layer; its d_z begins two pixels of margin before d_z[0]
  float* row_colours;  // its products: [5 slots, 4 * tiles, 16]
  float* taps;         // any other first layer: [k slots, out_w, k, taps_p]
  std::int32_t taps_p;
  float* tap_sums;  // [tap_columns, taps_p]: taps of one image row, with K - 1 zero columns on both sides
  std::int32_t tap_columns;
  float* grad_row;  // [in_w * 3 + 4]
};

inline void first_layer_layout(Arena& arena, const LayerView& first, Backward& b) {
  b.grad_row = arena.floats(first.in_w * 3 + 4);
  if (first.winograd != nullptr) {
    WinogradGradientArgs& w = b.winograd;
    w.tiles = (first.in_w + kTile - 1) / kTile;
    w.channels = first.out_c;
    w.channels_p = first.out_p;
    w.weights = first.winograd_transposed;
    float* padded = arena.floats(static_cast<std::int64_t>(w.tiles * kTile + kPoints - kTile) * w.channels_p);
    w.d_z = padded;
    b.d_z[0] = padded == nullptr ? nullptr : padded + 2 * w.channels_p;
    w.transformed = arena.floats(static_cast<std::int64_t>(kPoints) * w.tiles * w.channels_p);
    w.products = arena.floats(static_cast<std::int64_t>(kPoints) * w.tiles * kRowColours);
    b.row_colours = arena.floats(5LL * w.tiles * kTile * kRowColours);
    return;
  }
  b.d_z[0] = arena.floats(static_cast<std::int64_t>(first.out_w) * first.out_p);
  b.taps_p = (first.kernel * 3 + kPaddedChannels - 1) / kPaddedChannels * kPaddedChannels;
  b.taps = arena.floats(static_cast<std::int64_t>(first.kernel) * first.out_w * first.kernel * b.taps_p);
  const int reach = (first.pad_left + first.in_w - 1) / first.stride + 1;
  b.tap_columns = 2 * (first.kernel - 1) + (reach > first.out_w ? reach : first.out_w);
  b.tap_sums = arena.floats(static_cast<std::int64_t>(b.tap_columns) * b.taps_p);
}

// Zero what the kernels read around the rows: the scratch comes with the last call's values.
inline void zero_first_layer(const Backward& b) {
  const LayerView& first = b.forward.model->layers[0];
  if (first.winograd != nullptr) {
    const WinogradGradientArgs& w = b.winograd;
    float* after = b.d_z[0] + static_cast<std::int64_t>(first.out_w) * w.channels_p;
    fill_zero(b.d_z[0] - 2 * w.channels_p, 2 * w.channels_p);
    fill_zero(after, static_cast<std::int64_t>(w.tiles * kTile + 2 - first.out_w) * w.channels_p);
  } else {
    fill_zero(b.tap_sums, static_cast<std::int64_t>(b.tap_columns) * b.taps_p);
  }
}

inline void backward_layout(Arena& arena, const ModelView& model, Backward& b) {
  b.forward.fast = false;
  b.forward.pixel_pairs = false;
  forward_layout(arena, model, true, b.forward);
  for (int l = 0; l < model.depth; ++l) {
    const LayerView& layer = model.layers[l];
    b.next[l] = 0;
    if (l == 0) {
      first_layer_layout(arena, layer, b);
      continue;
    }
    b.d_z[l] = arena.floats(static_cast<std::int64_t>(layer.out_w) * layer.out_p);
    const int left = (layer.kernel - 1) / layer.stride;
    const int columns = left + (layer.pad_left + layer.in_w - 1 + kTransposedPixels) / layer.stride + 1;
    const int needed = left + layer.out_w;
    const int slots = (layer.kernel - 1) / layer.stride + 1;
    b.rings[l] =
        make_ring(arena, slots, vectors_of(layer.in_p), left, columns > needed ? columns : needed, layer.out_w);
  }
}

// Last output row whose kernel window reaches input row y, limited to the map.
inline int last_reaching(const LayerView& layer, int y) {
  const int v = (y + layer.pad_top) / layer.stride;
  return v < layer.out_h ? v : layer.out_h - 1;
}

// d z of row y of layer l into b.d_z[l], pixel-major.
inline void d_z_row(Backward& b, int l, int y);

// Row v of pointwise^T d z of layer l >= 1 into its ring.
inline void d_pointwise_row(Backward& b, int l, int v) {
  d_z_row(b, l, v);
  const LayerView& layer = b.forward.model->layers[l];
  const Ring& ring = b.rings[l];
  const float* a = b.d_z[l];
  GemmArgs g = plain_product(&a, layer.out_p, &layer.transposed, layer.in_p, layer.out_c, layer.out_w);
  g.vectors = ring.vectors;
  g.out = ring.map_row(v);
  g.out_vector_stride = ring.vector_stride;
  g.out_pixel_stride = kLanes;
  gemm<ExactProduct>(g);
}

inline void d_z_row(Backward& b, int l, int y) {
  const ModelView& model = *b.forward.model;
  const LayerView& layer = model.layers[l];
  const Masks& masks = b.forward.masks[l];
  const std::uint16_t* mask = masks.row(y);
  if (l == model.depth - 1) {
    const float* readout = model.readout + static_cast<std::int64_t>(y) * layer.out_w * layer.out_p;
    const vf scale = vset1(b.cotangent);
    for (int x = 0; x < layer.out_w; ++x) {
      for (int v = 0; v < vectors_of(layer.out_p); ++v) {
        const std::int64_t at = static_cast<std::int64_t>(x) * layer.out_p + v * kLanes;
        vstore(b.d_z[l] + at, vwhere(mask[v * masks.vector_stride + x], vmul(scale, vload(readout + at))));
      }
    }
    return;
  }
  const LayerView& above = model.layers[l + 1];
  const Ring& ring = b.rings[l + 1];
  const int last = last_reaching(above, y);
  while (b.next[l + 1] <= last) {
    d_pointwise_row(b, l + 1, b.next[l + 1]);
    ++b.next[l + 1];
  }
  DepthwiseArgs d = {};
  for (int i = 0; i < above.kernel; ++i) {
    const int reach = y + above.pad_top - i;
    const int v = reach / above.stride;
    const bool taken = reach >= 0 && reach % above.stride == 0 && v < above.out_h;
    d.rows[i] = taken ? ring.map_row(v) : nullptr;
  }
  d.row_vector_stride = ring.vector_stride;
  d.weights = above.spatial;
  d.channels_p = above.in_p;
  d.kernel = above.kernel;
  d.stride = above.stride;
  d.vectors = vectors_of(above.in_p);
  d.width = layer.out_w;
  d.offset = above.pad_left;
  d.out = b.d_z[l];
  d.mask = mask;
  d.mask_stride = masks.vector_stride;
  depthwise_transposed(d);
}

// Row v of the first layer: products of d z_0 with the kernel, into the ring that gather_row reads.
inline void taps_row(Backward& b, int v) {
  d_z_row(b, 0, v);
  const LayerView& layer = b.forward.model->layers[0];
  if (layer.winograd != nullptr) {
    b.winograd.out = b.row_colours + static_cast<std::int64_t>(v % 5) * b.winograd.tiles * kTile * kRowColours;
    winograd_gradient_row(b.winograd);
    return;
  }
  const std::int64_t row_floats = static_cast<std::int64_t>(layer.kernel) * b.taps_p;
  const float* a = b.d_z[0];
  GemmArgs g = plain_product(&a, layer.out_p, &layer.transposed, row_floats, layer.out_c, layer.out_w);
  g.vectors = static_cast<std::int32_t>(row_floats / kLanes);
  g.out = b.taps + (v % layer.kernel) * layer.out_w * row_floats;
  g.out_vector_stride = kLanes;
  g.out_pixel_stride = row_floats;
  gemm<ExactProduct>(g);
}

// Sum the taps that fall on each pixel of image row y into b.grad_row [in_w, 3]: first over the rows of the kernel, whole
// vectors at a time, then over its columns.
template <int K>
void gather_taps(const Backward& b, int y) {
  const LayerView& layer = b.forward.model->layers[0];
  const std::int64_t taps_p = b.taps_p, pixel_floats = K * taps_p;
  const float* rows[K] = {};
  int n_rows = 0;
  for (int i = 0; i < K; ++i) {
    const int reach = y + layer.pad_top - i;
    const int v = reach / layer.stride;
    if (reach < 0 || reach % layer.stride != 0 || v >= layer.out_h) continue;
    rows[n_rows++] = b.taps + (v % K) * layer.out_w * pixel_floats + i * taps_p;
  }
  float* CL_RESTRICT sums = b.tap_sums + (K - 1) * taps_p;  // column 0 of the map; zero columns on both sides
  for (int x = 0; x < layer.out_w; ++x) {
    for (int t = 0; t < taps_p; t += kLanes) {
      vf sum = vzero();
      for (int i = 0; i < n_rows; ++i) sum = vadd(sum, vload(rows[i] + x * pixel_floats + t));
      vstore(sums + x * taps_p + t, sum);
    }
  }
  for (int x = 0; x < layer.in_w; ++x) {
    const int reach = x + layer.pad_left;
    v4 colour;
    if (layer.stride == 1) {
      colour = v4_load(sums + reach * taps_p);
      CL_UNROLL for (int j = 1; j < K; ++j) colour = v4_add(colour, v4_load(sums + (reach - j) * taps_p + j * 3));
    } else {
      const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      colour = v4_load(zero);
      for (int j = reach % 2; j < K; j += 2) colour = v4_add(colour, v4_load(sums + (reach - j) / 2 * taps_p + j * 3));
    }
    v4_store(b.grad_row + x * 3, colour);
  }
}

// The same for a Winograd first layer, whose columns are summed already.
inline void gather_row_colours(const Backward& b, int y) {
  const LayerView& layer = b.forward.model->layers[0];
  const std::int64_t row_floats = static_cast<std::int64_t>(b.winograd.tiles) * kTile * kRowColours;
  const float* rows[5] = {};
  int n_rows = 0;
  for (int i = 0; i < 5; ++i) {
    const int v = y + 2 - i;
    if (v >= 0 && v < layer.out_h) rows[n_rows++] = b.row_colours + (v % 5) * row_floats + i * 3;
  }
  for (int x = 0; x < layer.in_w; ++x) {
    v4 colour = v4_load(rows[0] + x * kRowColours);
    for (int i = 1; i < n_rows; ++i) colour = v4_add(colour, v4_load(rows[i] + x * kRowColours));
    v4_store(b.grad_row + x * 3, colour);
  }
}

inline void gather_row(const Backward& b, int y) {
  if (b.forward.model->layers[0].winograd != nullptr) return gather_row_colours(b, y);
  switch (b.forward.model->layers[0].kernel) {
    case 1: return gather_taps<1>(b, y);
    case 3: return gather_taps<3>(b, y);
    case 5: return gather_taps<5>(b, y);
    default: return gather_taps<7>(b, y);
  }
}

inline std::int64_t backward_scratch_bytes(const ModelView& model) {
  Arena arena = {nullptr, 0};
  Backward b;
  backward_layout(arena, model, b);
  return arena.used;
}

inline float bank_gradient(const ModelView& model, const PreparedImage& image, float cotangent, bool overwrite,
                           bool repeat, float* grad, void* scratch) {
  Arena arena = {static_cast<char*>(scratch), 0};
  Backward b;
  b.forward.model = &model;
  b.forward.image = &image;
  b.cotangent = cotangent;
  backward_layout(arena, model, b);
  const float response = repeat ? 0.0f : forward_pass(b.forward);

  const LayerView& first = model.layers[0];
  for (int l = 1; l < model.depth; ++l) zero_margins(b.rings[l]);
  zero_first_layer(b);
  for (int y = 0; y < first.in_h; ++y) {
    const int last = last_reaching(first, y);
    while (b.next[0] <= last) {
      taps_row(b, b.next[0]);
      ++b.next[0];
    }
    gather_row(b, y);
    float* CL_RESTRICT out = grad + static_cast<std::int64_t>(y) * first.in_w * 3;
    const float* CL_RESTRICT row = b.grad_row;
    if (overwrite) {
      for (int i = 0; i < first.in_w * 3; ++i) out[i] = row[i];
    } else {
      for (int i = 0; i < first.in_w * 3; ++i) out[i] += row[i];
    }
  }
  return response;
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
