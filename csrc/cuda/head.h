// The head of a model of the published form: layers 0, 1 and 2 fused, rows streaming through shared memory.
//
// One step takes kRows rows of the first map, in four phases with a barrier after each:
//
//   first    rows of the first map, kRows x width pixels x 80 x channels, as products on tensor cores. A operands are read
//            from image rows that are kept twice, the second copy one number further, so that every pair of neighbours
//            lies in one aligned word.
//   spread1  depthwise layer of stride 2: every thread owns a pair of channels and kColumns output columns, reads a row
//            once and adds it to the sums of the two or three output rows it belongs to. Only those sums live on.
//   mix1     pointwise layer for the rows that are complete, on tensor cores.
//   spread2  depthwise layer of the third map; the next image rows are fetched. A row that is complete goes through its
//            pointwise layer (mix2) in a phase of its own.
//
// No row is computed twice, except at the borders of bands, if an image is cut into runs of rows of the third map.
#pragma once

#include "numbers.h"

namespace cortexloop::cuda {

// Sums of a depthwise layer of stride 2 and kernel 5 in one thread: a pair of channels, kColumns output columns, and the
// three output rows m - 1, m, m + 1 that rows 2m and 2m + 1 of the input reach.
template <class Numbers>
struct Sums {
  using Pair = typename Numbers::Pair;
  static constexpr int kColumns = Numbers::kColumns;
  Pair value[3][kColumns];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int u = 0; u < kColumns; ++u) set_zero(value[s][u]);
    }
  }

  // Between rows the third output row holds zeros; the other two can wait elsewhere.
  static constexpr int kParkedPairs = 2 * kColumns;

  __device__ __forceinline__ void park(Pair* place) const {
#pragma unroll
    for (int i = 0; i < kParkedPairs; ++i) {
      place[i * Numbers::kThreads + thread_index()] = value[i / kColumns][i % kColumns];
    }
  }

  __device__ __forceinline__ void fetch(const Pair* place) {
    clear();
#pragma unroll
    for (int i = 0; i < kParkedPairs; ++i) {
      value[i / kColumns][i % kColumns] = place[i * Numbers::kThreads + thread_index()];
    }
  }

  // Output row m - 1 is complete: m becomes m + 1.
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int u = 0; u < kColumns; ++u) {
      value[0][u] = value[1][u];
      value[1][u] = value[2][u];
      set_zero(value[2][u]);
    }
  }

  // Adds one input row. `row` points at the input column before the first output's centre but one; `stride` and
  // `pairs` count Pairs. An odd row is tap row 4, 2, 0 of the three output rows, an even one 3, 1 of the first two.
  template <bool kOdd>
  __device__ __forceinline__ void add(const Pair* row, int stride, const Pair* taps, int pairs) {
    constexpr int kSlots = kOdd ? 3 : 2;
    Pair w[kSlots][5];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int j = 0; j < 5; ++j) w[s][j] = taps[(((kOdd ? 4 : 3) - 2 * s) * 5 + j) * pairs];
    }
#pragma unroll
    for (int column = 0; column < 2 * kColumns + 3; ++column) {
      const Pair x = row[column * stride];
#pragma unroll
      for (int j = 0; j < 5; ++j) {
        if ((column - j) % 2 != 0 || column < j || (column - j) / 2 >= kColumns) continue;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) fused_add(value[s][(column - j) / 2], w[s][j], x);
      }
    }
  }

  __device__ __forceinline__ void add_row(bool odd, const Pair* row, int stride, const Pair* taps, int pairs) {
    if (odd) {
      add<true>(row, stride, taps, pairs);
    } else {
      add<false>(row, stride, taps, pairs);
    }
  }
};

// Where things lie in shared memory. Strides are chosen so that the accesses of a warp fall into different banks. What is
// needed in different phases shares a place: image rows with operand1, the second map and operand2 with the first map.
struct HeadLayout {
  std::int32_t copy_words;                                 // image: one copy of one row; two copies to a row
  std::int32_t image_plane;                                // image: words of one plane of all rows
  std::int32_t first_stride, first_width;                  // first map: numbers per pixel, pixels per row
  std::int32_t second_stride, second_width;                // second map: likewise
  std::int32_t operand1_stride, operand1_plane;            // halves per pixel, halves per plane
  std::int32_t operand2_stride, operand2_plane;            // likewise
  std::int32_t operand1, second, operand2, parked, bytes;  // starts; the first map starts at 0
};

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <class Numbers>
__host__ __device__ inline HeadLayout head_layout(const HeadRecord& head, int width) {
  constexpr int kNumber = static_cast<int>(sizeof(typename Numbers::Pair)) / 2;
  constexpr int kColumns = Numbers::kColumns, kRows = Numbers::kRows;
  HeadLayout l;
  // 3 * 16 * tiles + 13 halves are read; copies lie an odd multiple of 16 words apart (see `first_tiles`).
  const int words = (3 * ceil_div(width, 16) * 16 + 14) / 2;
  l.copy_words = ceil_div(words - 16, 32) * 32 + 16;
  l.image_plane = (kRows + 4) * 2 * l.copy_words;
  const int width1 = width / 2, width2 = width / 4;
  l.first_stride = 8 * (head.first.n_tiles | 1);
  l.first_width = 2 * kColumns * ceil_div(width1, kColumns) + 3;
  l.second_stride = 8 * (head.mix1.n_tiles | 1);
  l.second_width = 2 * kColumns * ceil_div(width2, kColumns) + 3;
  l.operand1_stride = 16 * head.mix1.k_tiles + 8;
  l.operand1_plane = ceil_div(kRows / 2 * width1, 16) * 16 * l.operand1_stride;
  l.operand2_stride = 16 * head.mix2.k_tiles + 8;
  l.operand2_plane = ceil_div(width2, 16) * 16 * l.operand2_stride;
  const auto lines = [](int bytes) { return ceil_div(bytes, 128) * 128; };
  const auto larger = [](int x, int y) { return x > y ? x : y; };
  const int first = lines(kRows * l.first_width * l.first_stride * kNumber);
  const int image = lines(Numbers::kPlanes * l.image_plane * 4);
  const int operand1 = lines(Numbers::kPlanes * l.operand1_plane * 2);
  l.second = 0;
  l.operand2 = lines(kRows / 2 * l.second_width * l.second_stride * kNumber);
  l.operand1 = larger(first, l.operand2 + lines(Numbers::kPlanes * l.operand2_plane * 2));
  l.parked = l.operand1 + larger(image, operand1);
  l.bytes = l.parked + (Numbers::kParked ? Sums<Numbers>::kParkedPairs * Numbers::kThreads * 2 * kNumber : 0);
  return l;
}

// Bits of the ReLUs of the first two maps: [height, width, n_tiles] bytes of eight channels each.
struct HeadMasks {
  std::uint8_t* first;
  std::uint8_t* second;
};

// One byte per pixel and tile of eight channels, from the four lanes that hold them.
__device__ __forceinline__ std::uint32_t mask_byte(float x, float y, int lane) {
  std::uint32_t byte = ((x > 0.0f ? 1u : 0u) | (y > 0.0f ? 2u : 0u)) << (2 * (lane & 3));
  byte |= __shfl_xor_sync(0xffffffffu, byte, 1);
  byte |= __shfl_xor_sync(0xffffffffu, byte, 2);
  return byte;
}

// Image rows y - 2 .. y + kRows + 1, from column -2 on, as halves. The padding is zero after recentring; levels are kept
// minus the *rounded* mean, which is exact, so their padding is what rounding the mean took away.
template <class Numbers>
__device__ __forceinline__ void fetch_rows(const ImagesRef& images, const float* mean, std::int64_t image, int y,
                                           const HeadLayout& l, std::uint32_t* to) {
  const int count = (Numbers::kRows + 4) * l.copy_words;
  for (int i = thread_index(); i < count; i += Numbers::kThreads) {
    const int row = i / l.copy_words, word = i - row * l.copy_words;
    const int image_y = y - 2 + row;
    float v[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const int at = 2 * word + j, column = at / 3, c = at - 3 * column, x = column - 2;
      const bool inside = image_y >= 0 && image_y < images.height && x >= 0 && x < images.width;
      if (images.is_u8) {
        const float centre = rintf(mean[c]);
        v[j] = mean[c] - centre;
        if (inside) {
          v[j] =
              static_cast<float>(static_cast<const std::uint8_t*>(images.data)[images.offset(image, image_y, x, c)]) -
              centre;
        }
      } else {
        v[j] = inside ? static_cast<const float*>(images.data)[images.offset(image, image_y, x, c)] : 0.0f;
      }
    }
    std::uint32_t* here = to + 2 * row * l.copy_words + word;
    const __half2 even = __floats2half2_rn(v[0], v[1]), odd = __floats2half2_rn(v[1], v[2]);
    here[0] = bits(even);
    here[l.copy_words] = bits(odd);
    if (Numbers::kExact && !images.is_u8) {
      const float2 e = __half22float2(even), o = __half22float2(odd);
      here[l.image_plane] = bits(__floats2half2_rn(v[0] - e.x, v[1] - e.y));
      here[l.image_plane + l.copy_words] = bits(__floats2half2_rn(v[1] - o.x, v[2] - o.y));
    }
  }
}

// Rows y .. y + kRows - 1 of the first map, kTiles tiles of eight channels from n0 on, by the warps of one parity.
//
// A warp takes tiles of 16 pixels. The weights stay in registers; kTogether rows share image rows. K is 16 per image row:
// three colours of five pixels, and one number more that meets a zero weight. With g = lane / 4, t = lane % 4, the words
// that a lane needs start at number 3 (x + g) + 2t: odd for odd g, so those lanes read the second copy. Even lanes fall
// on banks 0..12, odd ones on 16..29.
template <class Numbers, bool kMasks, int kTiles>
__device__ __forceinline__ void first_tiles(const BankRef& bank, const HeadRecord& head, const ImagesRef& images, int y,
                                            int n0, const HeadLayout& l, unsigned char* shared,
                                            const HeadMasks& masks) {
  using Pair = typename Numbers::Pair;
  constexpr int kPlanes = Numbers::kPlanes, kRows = Numbers::kRows;
  constexpr int kTogether = Numbers::kExact ? 1 : 2;  // two need more registers than the exact mode has
  const int thread = thread_index(), lane = thread & 31;
  const int n_tiles = head.first.n_tiles;
  const uint2* fragments = bank.at<uint2>(head.first.fragments) + n0 * kFirstKernel * 32 + lane;
  uint2 b[kPlanes][kTiles][kFirstKernel];
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int dy = 0; dy < kFirstKernel; ++dy) b[p][j][dy] = fragments[((p * n_tiles + j) * kFirstKernel + dy) * 32];
    }
  }
#pragma unroll 1
  for (int task = thread >> 6; task < ceil_div(images.width, 16) * (kRows / kTogether);
       task += Numbers::kThreads / 64) {
    const int m = task / (kRows / kTogether), row = kTogether * (task - m * (kRows / kTogether));
    if (y + row >= images.height) continue;
    float sum[kTogether][kTiles][4];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[r][j][e] = 0.0f;
      }
    }
    const int g = lane >> 2;
    const std::uint32_t* word = reinterpret_cast<const std::uint32_t*>(shared + l.operand1) +
                                (2 * row + (g & 1)) * l.copy_words + (3 * (16 * m + g) - (g & 1)) / 2 + (lane & 3);
    // Float images have a second plane in the exact mode; of levels, which are exact, it would be zero.
#pragma unroll 1
    for (int plane = 0; plane < (Numbers::kExact && !images.is_u8 ? 2 : 1); ++plane) {
#pragma unroll
      for (int i = 0; i < kFirstKernel - 1 + kTogether; ++i) {
        const std::uint32_t* at = word + 2 * i * l.copy_words;
        const std::uint32_t a[4] = {at[0], at[12], at[4], at[16]};
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          if (p + plane > 1) continue;
#pragma unroll
          for (int r = 0; r < kTogether; ++r) {
            const int dy = i - r;
            if (dy < 0 || dy >= kFirstKernel) continue;
#pragma unroll
            for (int j = 0; j < kTiles; ++j) mma_16816(sum[r][j], a, b[p][j][dy].x, b[p][j][dy].y);
          }
        }
      }
      word += l.image_plane;
    }
    const int own = thread_index() & 31;  // the lane again, not to keep it through the products
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int pair = (n0 + j) * 4 + (own & 3);  // of channels
      const float4 f = bank.at<float4>(images.is_u8 ? head.first_u8 : head.first_f32)[pair];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int x = 16 * m + (own >> 2) + 8 * h;
          const float u = relu(fmaf(sum[r][j][2 * h], f.x, f.z));
          const float v = relu(fmaf(sum[r][j][2 * h + 1], f.y, f.w));
          if (x < images.width) {
            Pair* out = reinterpret_cast<Pair*>(shared);
            store_pair(out + ((row + r) * l.first_width + x + 1) * (l.first_stride / 2) + pair, u, v);
          }
          if (kMasks) {
            const std::uint32_t byte = mask_byte(u, v, own);
            if (x < images.width && (own & 3) == 0) {
              masks.first[((y + row + r) * images.width + x) * n_tiles + n0 + j] = static_cast<std::uint8_t>(byte);
            }
          }
        }
      }
    }
  }
}

// All channels: even warps take the first half of the tiles, odd ones the others. How many a warp takes at a time is a
// constant of the loop over pixels, which then has no branches.
template <class Numbers, bool kMasks>
__device__ __forceinline__ void first_rows(const BankRef& bank, const HeadRecord& head, const ImagesRef& images, int y,
                                           const HeadLayout& l, unsigned char* shared, const HeadMasks& masks) {
  constexpr int kMost = Numbers::kExact ? 2 : 3;
#pragma unroll 1
  for (int chunk = 0;; ++chunk) {
    const bool odd = (thread_index() & 32) != 0;
    const int n_tiles = head.first.n_tiles, middle = (n_tiles + 1) / 2;
    const int each = ceil_div(middle, ceil_div(middle, kMost)), n0 = (odd ? middle : 0) + chunk * each;
    const int count = min(each, (odd ? n_tiles : middle) - n0);
    if (count <= 0) break;
    if (count == 1) first_tiles<Numbers, kMasks, 1>(bank, head, images, y, n0, l, shared, masks);
    if (count == 2) first_tiles<Numbers, kMasks, 2>(bank, head, images, y, n0, l, shared, masks);
    if (count == 3) first_tiles<Numbers, kMasks, kMost>(bank, head, images, y, n0, l, shared, masks);
  }
}

// Which pair of channels and which columns a thread owns in a depthwise layer.
struct Share {
  int pair, column;  // the first output column
  bool any, live;    // anything at all; real channels rather than the zeros behind them

  __device__ __forceinline__ Share(const TapsRecord& taps, int live_pairs, int each, int columns) {
    const int thread = thread_index(), group = thread / taps.pairs;
    pair = thread - group * taps.pairs;
    column = group * each;
    any = column < columns;
    live = any && pair < live_pairs;
  }
};

__device__ __forceinline__ const __half2* taps_at(const BankRef& bank, const TapsRecord& taps, __half2) {
  return bank.at<__half2>(taps.halves);
}
__device__ __forceinline__ const float2* taps_at(const BankRef& bank, const TapsRecord& taps, float2) {
  return bank.at<float2>(taps.floats);
}

// Row `pixel0`, pixel0 + 1, ... of the operands of a pointwise layer from the complete sums.
template <class Numbers>
__device__ __forceinline__ void hand_over(const Sums<Numbers>& sums, const Share& share, int columns, int pixel0,
                                          __half* operand, int stride, int plane) {
#pragma unroll
  for (int u = 0; u < Numbers::kColumns; ++u) {
    if (share.column + u < columns) {
      store_operand(operand + (pixel0 + share.column + u) * stride + 2 * share.pair, plane, sums.value[0][u]);
    }
  }
}

// One warp's part of a pointwise layer: kM tiles of 16 pixels from `m` on by kN tiles of eight channels from `n` on.
template <class Numbers, int kM, int kN, class Store>
__device__ __forceinline__ void mix_tiles(const BankRef& bank, const MatrixRecord& matrix, const __half* operand,
                                          int stride, int plane, int m, int m_tiles, int n, const Store& store) {
  constexpr int kPlanes = Numbers::kPlanes;
  const int lane = thread_index() & 31;
  float sum[kM][kN][4];
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
    }
  }
  const uint2* fragments = bank.at<uint2>(matrix.fragments) + n * matrix.k_tiles * 32 + lane;
  const int low_plane = matrix.n_tiles * matrix.k_tiles * 32;
#pragma unroll 1
  for (int k = 0; k < matrix.k_tiles; ++k) {
    uint2 b[kPlanes][kN];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int j = 0; j < kN; ++j) b[p][j] = fragments[p * low_plane + (j * matrix.k_tiles + k) * 32];
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      // Beyond the last tile the last one is read again; its sums are not stored.
      const __half* from = operand + (min(m + i, m_tiles - 1) * 16 + (lane & 15)) * stride + k * 16 + (lane >> 4) * 8;
      std::uint32_t a[kPlanes][4];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) ldmatrix_x4(a[p], from + p * plane);
#pragma unroll
      for (int p = 0; p < kPlanes * kPlanes - (kPlanes - 1); ++p) {  // high high, high low, low high
#pragma unroll
        for (int j = 0; j < kN; ++j) mma_16816(sum[i][j], a[p / 2], b[p % 2][j].x, b[p % 2][j].y);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const int own = thread_index() & 31, pair = (n + j) * 4 + (own & 3);
    const float2 scale = bank.at<float2>(matrix.scale)[pair];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      if (m + i >= m_tiles) continue;
      const int pixel = (m + i) * 16 + (own >> 2);
      store(pixel, pair, sum[i][j][0] * scale.x, sum[i][j][1] * scale.y);
      store(pixel + 8, pair, sum[i][j][2] * scale.x, sum[i][j][3] * scale.y);
    }
  }
}

// A pointwise layer: operands [pixels, K] in shared memory times a matrix. `store(pixel, pair, x, y)` gets the sums of a
// pair of output channels, by all lanes of a warp together. A warp takes kM tiles of pixels by up to kN of channels.
template <class Numbers, int kM, int kN, class Store>
__device__ __forceinline__ void mix(const BankRef& bank, const MatrixRecord& matrix, const __half* operand, int stride,
                                    int plane, int pixels, const Store& store) {
  constexpr int kWarps = Numbers::kThreads / 32;
  const int m_tiles = ceil_div(pixels, 16), groups = ceil_div(m_tiles, kM);
  const int wanted = max(ceil_div(matrix.n_tiles, kN), min(matrix.n_tiles, ceil_div(kWarps, groups)));
  const int each = ceil_div(matrix.n_tiles, wanted), chunks = ceil_div(matrix.n_tiles, each);
#pragma unroll 1
  for (int task = thread_index() >> 5; task < groups * chunks; task += kWarps) {
    const int group = task / chunks, n = (task - group * chunks) * each, m = group * kM;
    const int count = min(each, matrix.n_tiles - n);
    if (count == 1) mix_tiles<Numbers, kM, 1>(bank, matrix, operand, stride, plane, m, m_tiles, n, store);
    if (kN > 1 && count == 2) {
      mix_tiles<Numbers, kM, (kN > 1 ? 2 : 1)>(bank, matrix, operand, stride, plane, m, m_tiles, n, store);
    }
    if (kN > 2 && count == 3) {
      mix_tiles<Numbers, kM, (kN > 2 ? 3 : 1)>(bank, matrix, operand, stride, plane, m, m_tiles, n, store);
    }
    if (kN > 3 && count == 4) {
      mix_tiles<Numbers, kM, (kN > 3 ? 4 : 1)>(bank, matrix, operand, stride, plane, m, m_tiles, n, store);
    }
  }
}

// Columns outside a map are zero for good: one on the left, the others on the right of the `used` ones.
template <class Pair>
__device__ __forceinline__ void clear_margins(Pair* rows, int count, int columns, int used, int stride) {
  const int margin = (columns - used) * stride;
  for (int i = thread_index(); i < count * margin; i += static_cast<int>(blockDim.x)) {
    const int line = i / margin, rest = i - line * margin;
    set_zero(rows[line * columns * stride + rest + (rest < stride ? 0 : used * stride)]);
  }
}

// What one call of run_head does: rows begin .. end - 1 of the third map [height / 4, width / 4, channels2] of one image.
struct HeadJob {
  std::int64_t image;
  float* map;
  HeadMasks masks;
  std::int32_t begin, end;
};

// Ends with a barrier. The job and the layout lie in shared memory and addresses are worked out anew in every phase: what
// would otherwise be kept in registers over the whole loop leaves too few for the sums.
template <class Numbers, bool kMasks>
__device__ __forceinline__ void run_head(const BankRef& bank, const ModelRecord& model, const ImagesRef& images,
                                         unsigned char* shared, const HeadJob& job) {
  using Pair = typename Numbers::Pair;
  constexpr int kRows = Numbers::kRows;
  __shared__ HeadLayout l;
  const HeadRecord& head = model.head;
  const int height = images.height, width1 = images.width / 2, width2 = images.width / 4;
  if (threadIdx.x == 0) l = head_layout<Numbers>(head, images.width);
  __syncthreads();
  Sums<Numbers> sums1, sums2;
  sums1.clear();
  sums2.clear();
  if (Numbers::kParked) sums2.park(reinterpret_cast<Pair*>(shared + l.parked));

  // Step v holds rows kRows v .. of the first map; they complete rows kRows / 2 v - 1 .. of the second one.
  int v = max(0, (4 * job.begin - 3 + kRows) / kRows - 1);
  fetch_rows<Numbers>(images, bank.header().mean, job.image, kRows * v, l,
                      reinterpret_cast<std::uint32_t*>(shared + l.operand1));
  __syncthreads();
#pragma unroll 1
  for (; v <= (4 * job.end + 4) / kRows; ++v) {
    clear_margins(reinterpret_cast<Pair*>(shared), kRows, l.first_width, images.width, l.first_stride / 2);
    first_rows<Numbers, kMasks>(bank, head, images, kRows * v, l, shared, job.masks);
    __syncthreads();

    {
      const Share share(head.taps1, head.first.n_tiles * 4, Numbers::kColumns, width1);
      if (share.any) {
        const Pair* taps = taps_at(bank, head.taps1, Pair()) + share.pair;
        const int stride = l.first_stride / 2;
        const Pair* row = reinterpret_cast<const Pair*>(shared) + 2 * share.column * stride + share.pair;
#pragma unroll 1
        for (int r = 0; r < kRows; r += 2) {
          if (kRows * v + r < height && share.live) {
            sums1.template add<false>(row + r * l.first_width * stride, stride, taps, head.taps1.pairs);
            sums1.template add<true>(row + (r + 1) * l.first_width * stride, stride, taps, head.taps1.pairs);
          }
          hand_over(sums1, share, width1, r / 2 * width1, reinterpret_cast<__half*>(shared + l.operand1),
                    l.operand1_stride, l.operand1_plane);
          sums1.advance();
        }
      }
    }
    __syncthreads();

    const int row1 = kRows / 2 * v - 1;  // of the second map, the first that is complete now
    Pair* second = reinterpret_cast<Pair*>(shared + l.second);
    if (row1 + kRows / 2 > 0 && row1 < height / 2) {
      clear_margins(second, kRows / 2, l.second_width, width1, l.second_stride / 2);
      mix<Numbers, Numbers::kExact ? 1 : kRows / 2, 3>(
          bank, head.mix1, reinterpret_cast<const __half*>(shared + l.operand1), l.operand1_stride, l.operand1_plane,
          kRows / 2 * width1, [&](int pixel, int pair, float x, float y) {
            const int line = pixel >= width1 ? 1 : 0, column = pixel - line * width1;
            const float2 b = bank.at<float2>(head.mix1_bias)[pair];
            const float u = relu(x + b.x), w = relu(y + b.y);
            const bool inside = pixel < kRows / 2 * width1;
            if (inside) {
              store_pair(second + (line * l.second_width + column + 1) * (l.second_stride / 2) + pair, u, w);
            }
            if (kMasks) {
              const int lane = thread_index() & 31;
              const std::uint32_t byte = mask_byte(u, w, lane);
              const int row = row1 + line;
              if (inside && (lane & 3) == 0 && row >= 0 && row < height / 2) {
                job.masks.second[(row * width1 + column) * head.mix1.n_tiles + pair / 4] =
                    static_cast<std::uint8_t>(byte);
              }
            }
          });
    }
    __syncthreads();

    int complete = -1;  // row of the third map whose operands are ready
    {
      const Share share(head.taps2, head.mix1.n_tiles * 4, Numbers::kColumns, width2);
      const Pair* taps = taps_at(bank, head.taps2, Pair()) + share.pair;
      const int stride = l.second_stride / 2;
      const Pair* line = second + 2 * share.column * stride + share.pair;
      if (Numbers::kParked) sums2.fetch(reinterpret_cast<const Pair*>(shared + l.parked));
#pragma unroll 1
      for (int row = max(row1, 0); row < row1 + kRows / 2; ++row) {
        const bool odd = row % 2 != 0;
        if (share.live && row < height / 2) {
          sums2.add_row(odd, line + (row - row1) * l.second_width * stride, stride, taps, head.taps2.pairs);
        }
        if (!odd) continue;
        const int row2 = (row - 3) / 2;
        if (row >= 3 && row2 >= job.begin && row2 < job.end) {
          complete = row2;
          if (share.any) {
            hand_over(sums2, share, width2, 0, reinterpret_cast<__half*>(shared + l.operand2), l.operand2_stride,
                      l.operand2_plane);
          }
        }
        sums2.advance();
      }
      if (Numbers::kParked) sums2.park(reinterpret_cast<Pair*>(shared + l.parked));
    }
    if (v < (4 * job.end + 4) / kRows) {
      fetch_rows<Numbers>(images, bank.header().mean, job.image, kRows * (v + 1), l,
                          reinterpret_cast<std::uint32_t*>(shared + l.operand1));
    }
    __syncthreads();

    if (complete >= 0) {
      const int channels = head.channels2;
      float* to = job.map + complete * width2 * channels;
      mix<Numbers, 1, 1>(bank, head.mix2, reinterpret_cast<const __half*>(shared + l.operand2), l.operand2_stride,
                         l.operand2_plane, width2, [&](int pixel, int pair, float x, float y) {
                           if (pixel >= width2) return;
                           const float2 b = bank.at<float2>(head.mix2_bias)[pair];
                           float* here = to + pixel * channels + 2 * pair;
                           if (2 * pair < channels) here[0] = relu(x + b.x);
                           if (2 * pair + 1 < channels) here[1] = relu(y + b.y);
                         });
      __syncthreads();
    }
  }
}

}  // namespace cortexloop::cuda
