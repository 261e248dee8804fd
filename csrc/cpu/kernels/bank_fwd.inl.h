// One image through one compact model, all layers fused.
//
// Work:   one call = one (image, model); nothing is shared between calls but the prepared image.
// Memory: rows stream from layer to layer. Each layer's output lives in a ring of as many rows as the next kernel is high
//         (5 rows of layer 0 of a published model: 108 KB), so no map is ever stored whole and no row is computed twice.
// Order:  a row is pulled when the layer above needs it; all sums run in the order stated in the kernels.
//
// For the gradient the same pass also records one bit per activation (positive or not).
#pragma once

#include "../kernel_table.h"
#include "depthwise.inl.h"
#include "gemm.inl.h"
#include "winograd.inl.h"

namespace cortexloop {
namespace cpu {
namespace {

constexpr int kImageMargin = 3;  // half of the largest kernel
constexpr int kImageSlack = 16;  // columns that blocked kernels may read behind the right margin

// Hands out 64-byte aligned pieces of a buffer; with a null base it only measures.
struct Arena {
  char* base;
  std::int64_t used;
  void* take(std::int64_t bytes) {
    void* piece = base == nullptr ? nullptr : base + used;
    used += (bytes + 63) / 64 * 64;
    return piece;
  }
  float* floats(std::int64_t n) { return static_cast<float*>(take(n * static_cast<std::int64_t>(sizeof(float)))); }
};

// Rows of one map, [slot][vector of channels][column][kLanes], with columns of zeros around the map.
struct Ring {
  float* data;
  std::int32_t slots, vectors, columns, left, map;  // `map` columns of the map follow `left` zero columns
  std::int64_t vector_stride, slot_stride;
  float* row(int y) const { return data + (y % slots) * slot_stride; }  // column 0 of the zero margin
  float* map_row(int y) const { return row(y) + left * kLanes; }        // column 0 of the map
};

inline Ring make_ring(Arena& arena, int slots, int vectors, int left, int columns, int map) {
  Ring r;
  r.slots = slots;
  r.vectors = vectors;
  r.columns = columns;
  r.left = left;
  r.map = map;
  r.vector_stride = static_cast<std::int64_t>(columns) * kLanes;
  r.slot_stride = r.vector_stride * vectors;
  r.data = arena.floats(r.slot_stride * slots);
  return r;
}

inline void zero_margins(const Ring& r) {
  for (int slot = 0; slot < r.slots; ++slot) {
    for (int v = 0; v < r.vectors; ++v) {
      float* row = r.data + slot * r.slot_stride + v * r.vector_stride;
      for (int x = 0; x < r.left; ++x) vstore(row + x * kLanes, vzero());
      for (int x = r.left + r.map; x < r.columns; ++x) vstore(row + x * kLanes, vzero());
    }
  }
}

inline std::int32_t vectors_of(std::int32_t padded_channels) { return padded_channels / kLanes; }

struct Masks {
  std::uint16_t* bits;         // [out_h, vectors, out_w]
  std::int64_t vector_stride;  // out_w
  std::int64_t row_stride;
  std::uint16_t* row(int y) const { return bits == nullptr ? nullptr : bits + y * row_stride; }
};

struct Forward {
  const ModelView* model;
  const PreparedImage* image;
  bool fast;
  bool pixel_pairs;              // the first ring holds two pixels in bfloat16 to a slot
  Ring rings[kMaxDepth];         // output of each layer; the last one's holds a single row
  Masks masks[kMaxDepth];        // null bits when only the response is wanted
  std::int32_t next[kMaxDepth];  // rows of each layer computed so far
  float* winograd_image;         // [6, 3, 8, tiles_p] of the two rows at work
  float* depthwise_row;          // [out_w, in_p] of the layer at work
};

// Fast mode: a Winograd first layer under a stride-2 layer leaves its rows as pairs of pixels in bfloat16, which halves the
// traffic of the largest map and the products of the next depthwise convolution.
inline bool pixel_pairs(const ModelView& model, bool fast) {
  return fast && model.depth > 1 && model.layers[0].winograd != nullptr && model.layers[1].stride == 2;
}

inline void forward_layout(Arena& arena, const ModelView& model, bool with_masks, Forward& f) {
  std::int64_t depthwise_floats = 0;
  for (int l = 0; l < model.depth; ++l) {
    const LayerView& layer = model.layers[l];
    const int vectors = vectors_of(layer.out_p);
    const int ahead = layer.winograd != nullptr ? 1 : 0;  // rows come in pairs
    if (l + 1 == model.depth) {
      f.rings[l] = make_ring(arena, 1 + ahead, vectors, 0, layer.out_w, layer.out_w);
    } else {
      const LayerView& above = model.layers[l + 1];
      const bool pairs = l == 0 && f.pixel_pairs;
      const int left = pairs ? (above.pad_left + 1) / 2 : above.pad_left;
      const int map = pairs ? (layer.out_w + 1) / 2 : layer.out_w;
      const int reach =
          pairs ? above.out_w - 1 + (above.kernel + 1) / 2 : (above.out_w - 1) * above.stride + above.kernel;
      f.rings[l] = make_ring(arena, above.kernel + ahead, vectors, left, reach > left + map ? reach : left + map, map);
    }
    f.next[l] = 0;
    Masks& m = f.masks[l];
    m.vector_stride = layer.out_w;
    m.row_stride = m.vector_stride * vectors;
    m.bits = nullptr;
    if (with_masks) {
      m.bits = static_cast<std::uint16_t*>(
          arena.take(m.row_stride * layer.out_h * static_cast<std::int64_t>(sizeof(std::uint16_t))));
    }
    const std::int64_t floats = static_cast<std::int64_t>(layer.out_w) * layer.in_p;
    if (floats > depthwise_floats) depthwise_floats = floats;
  }
  f.depthwise_row = arena.floats(depthwise_floats);
  f.winograd_image = arena.floats(kAcross * 3LL * kPoints * tiles_padded(model.layers[0].in_w));
}

// The product's result is row y of layer l: bias, ReLU, ring and masks.
inline void to_ring(const Forward& f, int l, int y, GemmArgs& g) {
  const Ring& ring = f.rings[l];
  g.vectors = ring.vectors;
  g.out = ring.map_row(y);
  g.out_vector_stride = ring.vector_stride;
  g.out_pixel_stride = kLanes;
  g.bias = f.model->layers[l].bias;
  g.mask = f.masks[l].row(y);
  g.mask_stride = f.masks[l].vector_stride;
}

// Rows y and y + 1 of a Winograd first layer; y is even.
inline void winograd_pair(const Forward& f, int y) {
  const LayerView& layer = f.model->layers[0];
  const Ring& ring = f.rings[0];
  const Masks& masks = f.masks[0];
  WinogradArgs w;
  w.tiles_p = f.image->tiles_p;
  const std::int64_t row_floats = 3LL * kPoints * w.tiles_p;
  winograd_columns_input(f.image->transformed + y * row_floats, row_floats, f.winograd_image);
  w.image = f.winograd_image;
  w.weights = layer.winograd;
  w.channels_p = layer.out_p;
  w.bias = layer.bias;
  w.width = layer.out_w;
  w.vectors = ring.vectors;
  w.rows = y + 1 < layer.out_h ? 2 : 1;
  for (int row = 0; row < w.rows; ++row) {
    w.out[row] = ring.map_row(y + row);
    w.mask[row] = masks.row(y + row);
  }
  w.out_vector_stride = ring.vector_stride;
  w.pairs = f.pixel_pairs;
  w.mask_stride = masks.vector_stride;
  winograd_rows(w);
}

inline void first_layer_row(const Forward& f, int y) {
  const LayerView& layer = f.model->layers[0];
  if (layer.winograd != nullptr) {
    if (y % 2 == 0) winograd_pair(f, y);  // an odd row came with the even one before it
    return;
  }
  const float* a[7];
  const float* b[7];
  for (int i = 0; i < layer.kernel; ++i) {
    const int image_row = y * layer.stride - layer.pad_top + i + kImageMargin;
    a[i] = f.image->rows + image_row * f.image->row_stride + (kImageMargin - layer.pad_left) * 3;
    b[i] = layer.spatial + static_cast<std::int64_t>(i) * layer.kernel * 3 * layer.out_p;
  }
  GemmArgs g = plain_product(a, layer.stride * 3, b, layer.out_p, layer.kernel * 3, layer.out_w);
  g.segments = layer.kernel;
  to_ring(f, 0, y, g);
  gemm<ExactProduct>(g);
}

inline void separable_row(const Forward& f, int l, int y) {
  const LayerView& layer = f.model->layers[l];
  const Ring& below = f.rings[l - 1];
  DepthwiseArgs d = {};
  for (int i = 0; i < layer.kernel; ++i) {
    const int r = y * layer.stride - layer.pad_top + i;
    d.rows[i] = r < 0 || r >= layer.in_h ? nullptr : below.row(r);
  }
  d.row_vector_stride = below.vector_stride;
  d.weights = layer.spatial;
  d.channels_p = layer.in_p;
  d.kernel = layer.kernel;
  d.stride = layer.stride;
  d.vectors = vectors_of(layer.in_p);
  d.width = layer.out_w;
  d.out = f.depthwise_row;
  d.pairs = f.fast;
#if defined(CORTEXLOOP_ISA_BF16)
  if (l == 1 && f.pixel_pairs) {
    d.weights = layer.pixel_pairs;
    depthwise_pairs(d);
  } else {
    depthwise(d);
  }
#else
  depthwise(d);
#endif

  const float* a = f.depthwise_row;
  GemmArgs g = plain_product(&a, layer.in_p, &layer.pointwise, layer.out_p, layer.in_c, layer.out_w);
  to_ring(f, l, y, g);
#if defined(CORTEXLOOP_ISA_BF16)
  if (f.fast) {
    g.b = &layer.pairs;
    g.depth = (layer.in_c + 1) / 2;
    g.lda = layer.in_p / 2;
    gemm<PairProduct>(g);
    return;
  }
#endif
  gemm<ExactProduct>(g);
}

// Compute row y of layer l, first the rows of the layers below that it needs and that are not there yet.
inline void produce_row(Forward& f, int l, int y) {
  if (l == 0) {
    first_layer_row(f, y);
    return;
  }
  const LayerView& layer = f.model->layers[l];
  int last = y * layer.stride - layer.pad_top + layer.kernel - 1;
  if (last >= layer.in_h) last = layer.in_h - 1;
  while (f.next[l - 1] <= last) {
    produce_row(f, l - 1, f.next[l - 1]);
    ++f.next[l - 1];
  }
  separable_row(f, l, y);
}

inline float forward_pass(Forward& f) {
  const ModelView& model = *f.model;
  for (int l = 0; l < model.depth; ++l) zero_margins(f.rings[l]);
  const LayerView& last = model.layers[model.depth - 1];
  const Ring& ring = f.rings[model.depth - 1];
  vf sums[2] = {vzero(), vzero()};
  const float* readout = model.readout;
  for (int y = 0; y < last.out_h; ++y) {
    produce_row(f, model.depth - 1, y);
    const float* row = ring.map_row(y);
    for (int x = 0; x < last.out_w; ++x) {
      for (int v = 0; v < ring.vectors; ++v) {
        sums[x & 1] = vfma(vload(row + v * ring.vector_stride + x * kLanes), vload(readout), sums[x & 1]);
        readout += kLanes;
      }
    }
  }
  return vsum(vadd(sums[0], sums[1])) + model.readout_bias;
}

inline std::int64_t forward_scratch_bytes(const ModelView& model) {
  Arena arena = {nullptr, 0};
  Forward f;
  f.pixel_pairs = false;  // the exact layout is the larger one
  forward_layout(arena, model, false, f);
  return arena.used;
}

inline float bank_forward(const ModelView& model, const PreparedImage& image, bool fast, void* scratch) {
  Arena arena = {static_cast<char*>(scratch), 0};
  Forward f;
  f.model = &model;
  f.image = &image;
  f.fast = fast;
  f.pixel_pairs = pixel_pairs(model, fast);
  forward_layout(arena, model, false, f);
  return forward_pass(f);
}

inline std::int64_t image_row_stride(std::int32_t width) { return (width + 2 * kImageMargin + kImageSlack) * 3; }

// What `prepare_image` needs besides its result.
struct PrepareScratch {
  float* phases;  // [3, 4, tiles_p + kTileAlign]
  float* row;     // [row_floats]: one recentred row behind two zero pixels
  std::int64_t row_floats;
};

inline void prepared_layout(Arena& arena, int height, int width, bool rows, bool transformed, PreparedImage& p,
                            PrepareScratch& scratch) {
  p.row_stride = image_row_stride(width);
  p.tiles_p = tiles_padded(width);
  p.rows = rows ? arena.floats((height + 2 * kImageMargin) * p.row_stride) : nullptr;
  p.transformed = transformed ? arena.floats(static_cast<std::int64_t>(height + 5) * 3 * kPoints * p.tiles_p) : nullptr;
  scratch.phases = arena.floats(3 * 4LL * (p.tiles_p + kTileAlign));
  scratch.row_floats = (width + 2 * kTile) * 3LL;
  scratch.row = arena.floats(scratch.row_floats);
}

inline std::int64_t prepared_bytes(std::int32_t height, std::int32_t width, bool rows, bool transformed) {
  Arena arena = {nullptr, 0};
  PreparedImage p;
  PrepareScratch scratch;
  prepared_layout(arena, height, width, rows, transformed, p, scratch);
  return arena.used;
}

// One row of an image as recentred floats, [width, 3]. float(level) - mean is the correctly rounded difference.
inline void recentred_row(const ImageSource& s, std::int64_t y, float* CL_RESTRICT out) {
  if (s.stride_c != 1) {
    for (int c = 0; c < 3; ++c) {
      const std::int64_t at = y * s.stride_y + c * s.stride_c;
      if (s.is_u8) {
        const auto* in = static_cast<const std::uint8_t*>(s.data) + at;
        for (int x = 0; x < s.width; ++x) out[x * 3 + c] = static_cast<float>(in[x]) - s.mean[c];
      } else {
        const auto* in = static_cast<const float*>(s.data) + at;
        for (int x = 0; x < s.width; ++x) out[x * 3 + c] = in[x];
      }
    }
    return;
  }
  const std::int64_t n = s.width * 3LL;
  if (!s.is_u8) {
    const auto* in = static_cast<const float*>(s.data) + y * s.stride_y;
    for (std::int64_t i = 0; i < n; ++i) out[i] = in[i];
    return;
  }
  const auto* CL_RESTRICT in = static_cast<const std::uint8_t*>(s.data) + y * s.stride_y;
  // The mean repeats every 3 values: blocks of 48 are whole vectors on every instruction set.
  float mean[48];
  for (int i = 0; i < 48; ++i) mean[i] = s.mean[i % 3];
  std::int64_t at = 0;
  for (; at + 48 <= n; at += 48) {
    for (int i = 0; i < 48; ++i) out[at + i] = static_cast<float>(in[at + i]) - mean[i];
  }
  for (std::int64_t i = 0; at + i < n; ++i) out[at + i] = static_cast<float>(in[at + i]) - mean[i];
}

inline void fill_zero(float* p, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) p[i] = 0.0f;
}

inline void prepare_image(const ImageSource& s, bool rows, bool transformed, void* memory, PreparedImage* image) {
  Arena arena = {static_cast<char*>(memory), 0};
  PrepareScratch scratch;
  prepared_layout(arena, s.height, s.width, rows, transformed, *image, scratch);
  if (rows) {
    fill_zero(image->rows, (s.height + 2 * kImageMargin) * image->row_stride);
    for (int y = 0; y < s.height; ++y) {
      recentred_row(s, y, image->rows + (y + kImageMargin) * image->row_stride + kImageMargin * 3);
    }
  }
  if (!transformed) return;
  const std::int32_t tiles_p = image->tiles_p, phase_stride = tiles_p + kTileAlign;
  const std::int64_t row_floats = 3LL * kPoints * tiles_p;
  fill_zero(image->transformed, 2 * row_floats);
  fill_zero(image->transformed + (s.height + 2) * row_floats, 3 * row_floats);
  fill_zero(scratch.phases, 3 * 4LL * phase_stride);
  fill_zero(scratch.row, scratch.row_floats);
  const int tiles = (s.width + 2 + kTile - 1) / kTile;
  for (int y = 0; y < s.height; ++y) {
    // Padded pixel 4 t + r is phase r of tile t; the row buffer has the two zero pixels of the left margin.
    recentred_row(s, y, scratch.row + 2 * 3);
    for (int t = 0; t < tiles; ++t) {
      for (int r = 0; r < 4; ++r) {
        for (int c = 0; c < 3; ++c) scratch.phases[(c * 4 + r) * phase_stride + t] = scratch.row[(t * 4 + r) * 3 + c];
      }
    }
    for (int c = 0; c < 3; ++c) {
      const float* phase[4];
      for (int r = 0; r < 4; ++r) phase[r] = scratch.phases + (c * 4 + r) * phase_stride;
      winograd_image_row(phase, tiles_p, image->transformed + (y + 2) * row_floats + c * kPoints * tiles_p);
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
