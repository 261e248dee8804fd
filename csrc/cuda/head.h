// The head of a model of the published form: layers 0, 1 and 2 fused, rows streaming through shared memory.
//
// One step takes kRows rows of the first map, in four phases with a barrier after each:
//
//   first    rows of the first map, kRows x width pixels x 80 x channels, as products on tensor cores. A operands are read
//            from rows of a prepared image (images.h).
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

  // Adds one input row. `row` points at the input column before the first output's centre but one. An odd row is tap row
  // 4, 2, 0 of the three output rows, an even one 3, 1 of the first two. Strides count Pairs.
  template <bool kOdd, int kStride, int kPairs>
  __device__ __forceinline__ void add(const Pair* row, const Pair* taps) {
    constexpr int kSlots = kOdd ? 3 : 2;
    Pair w[kSlots][5];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int j = 0; j < 5; ++j) w[s][j] = taps[(((kOdd ? 4 : 3) - 2 * s) * 5 + j) * kPairs];
    }
#pragma unroll
    for (int column = 0; column < 2 * kColumns + 3; ++column) {
      const Pair x = row[column * kStride];
#pragma unroll
      for (int j = 0; j < 5; ++j) {
        if ((column - j) % 2 != 0 || column < j || (column - j) / 2 >= kColumns) continue;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) fused_add(value[s][(column - j) / 2], w[s][j], x);
      }
    }
  }
};

constexpr int kSharedOfEveryDevice = 98 * 1024;  // 99 KB on the smallest, less what kernels declare themselves

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Where things lie in shared memory; bytes unless it says otherwise. Strides are such that the accesses of a warp fall
// into different banks. What is needed in different phases shares a place: image rows with operand1, the second map and
// operand2 with the first map, which starts at 0.
template <class Numbers>
struct HeadShape {
  static constexpr int kNumber = static_cast<int>(sizeof(typename Numbers::Pair)) / 2;
  static constexpr int kColumns = Numbers::kColumns, kRows = Numbers::kRows, kPlanes = Numbers::kPlanes;
  static constexpr int kWidth1 = kMaxWidth / 2, kWidth2 = kMaxWidth / 4;

  // Prepared image: words of one copy of a row, of which 3 * 112 + 13 halves are read; two copies to a row, an odd multiple
  // of 16 words apart (see `first_tiles`); words of the rows of one plane.
  static constexpr int kCopyWords = kPreparedRow / 2;
  static constexpr int kImagePlane = (kRows + 4) * kPreparedRow;
  static_assert(2 * kCopyWords >= 3 * kMaxWidth + 14 && kCopyWords % 32 == 16, "first_tiles reads that far");

  // Maps: pairs per pixel, pixels per row with margins of zeros.
  static constexpr int kStride1 = kMaxPairs1 + 4, kStride2 = kMaxPairs2 + 4;
  static constexpr int kRow1 = 2 * kColumns * ceil_div(kWidth1, kColumns) + 3;
  static constexpr int kRow2 = 2 * kColumns * ceil_div(kWidth2, kColumns) + 3;

  // Operands of the pointwise layers: halves per pixel, halves of one plane.
  static constexpr int kOperandStride1 = 2 * kMaxPairs1 + 8, kOperandStride2 = 2 * kMaxPairs2 + 8;
  static constexpr int kOperandPlane1 = ceil_div(kRows / 2 * kWidth1, 16) * 16 * kOperandStride1;
  static constexpr int kOperandPlane2 = ceil_div(kWidth2, 16) * 16 * kOperandStride2;

  static constexpr int kFirstBytes = kRows * kRow1 * kStride1 * 2 * kNumber;
  static constexpr int kOperand2 = ceil_div(kRows / 2 * kRow2 * kStride2 * 2 * kNumber, 128) * 128;
  static constexpr int kOperand1 = ceil_div(kFirstBytes, 128) * 128;
  static_assert(kOperand2 + kPlanes * kOperandPlane2 * 2 <= kFirstBytes, "the second map and its operands fit");
  static constexpr int kImageBytes = kPlanes * kImagePlane * 4, kOperandBytes = kPlanes * kOperandPlane1 * 2;
  static constexpr int kParked = kOperand1 + (kImageBytes > kOperandBytes ? kImageBytes : kOperandBytes);
  static constexpr int kBytes =
      kParked + (Numbers::kParked ? Sums<Numbers>::kParkedPairs * Numbers::kThreads * 2 * kNumber : 0);
  static_assert(kBytes <= kSharedOfEveryDevice, "every supported device runs heads");
  static_assert(ceil_div(kWidth1, kColumns) * kMaxPairs1 <= Numbers::kThreads &&
                    ceil_div(kWidth2, kColumns) * kMaxPairs2 <= Numbers::kThreads,
                "the threads of a block cover a row of each depthwise layer");
};

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

// Starts to fetch image rows y - 2 .. y + kRows + 1 from a prepared image (images.h); every thread waits for its part
// before the next barrier. Rows behind the image are left as they are: no row of the map needs them.
template <class Numbers>
__device__ __forceinline__ void fetch_rows(const uint4* prepared, int height, int planes, int y,
                                           unsigned char* shared) {
  using Shape = HeadShape<Numbers>;
  constexpr int kChunks = kPreparedRow / 4;  // of 16 bytes in a row
  const int chunks = min(Numbers::kRows + 4, height + 4 - y) * kChunks;
  for (int plane = 0; plane < planes; ++plane) {
    const uint4* from = prepared + (plane * (height + 4) + y) * kChunks;
    unsigned char* to = shared + Shape::kOperand1 + 4 * plane * Shape::kImagePlane;
#pragma unroll 1
    for (int i = thread_index(); i < chunks; i += Numbers::kThreads) copy_async_16(to + 16 * i, from + i);
  }
  copy_async_commit();
}

// Rows y .. y + kRows - 1 of the first map, kTiles tiles of eight channels from n0 on, by the warps of one parity.
//
// A warp takes tiles of 16 pixels. The weights stay in registers; kTogether rows share image rows. K is 16 per image row:
// three colours of five pixels, and one number more that meets a zero weight. With g = lane / 4, t = lane % 4, the words
// that a lane needs start at number 3 (x + g) + 2t: odd for odd g, so those lanes read the second copy. Even lanes fall
// on banks 0..12, odd ones on 16..29.
template <class Numbers, bool kMasks, int kTiles>
__device__ __forceinline__ void first_tiles(const BankRef& bank, const HeadRecord& head, const ImagesRef& images, int y,
                                            int n0, unsigned char* shared, const HeadMasks& masks) {
  using Pair = typename Numbers::Pair;
  using Shape = HeadShape<Numbers>;
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
    const std::uint32_t* word = reinterpret_cast<const std::uint32_t*>(shared + Shape::kOperand1) +
                                (2 * row + (g & 1)) * Shape::kCopyWords + (3 * (16 * m + g) - (g & 1)) / 2 + (lane & 3);
    // Float images have a second plane in the exact mode; of levels, which are exact, it would be zero.
#pragma unroll 1
    for (int plane = 0; plane < (Numbers::kExact && !images.is_u8 ? 2 : 1); ++plane) {
#pragma unroll
      for (int i = 0; i < kFirstKernel - 1 + kTogether; ++i) {
        const std::uint32_t* at = word + 2 * i * Shape::kCopyWords;
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
      word += Shape::kImagePlane;
    }
    const int own = thread_index() & 31;  // the lane again, not to keep it through the products
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int pair = (n0 + j) * 4 + (own & 3);  // of channels
      const float4 f = bank.at<float4>(images.is_u8 ? head.first_u8 : head.first.outputs)[pair];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int x = 16 * m + (own >> 2) + 8 * h;
          const float u = fmaf(sum[r][j][2 * h], f.x, f.z);
          const float v = fmaf(sum[r][j][2 * h + 1], f.y, f.w);
          if (x < images.width) {
            Pair* out = reinterpret_cast<Pair*>(shared);
            store_relu(out + ((row + r) * Shape::kRow1 + x + 1) * Shape::kStride1 + pair, u, v);
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
                                           unsigned char* shared, const HeadMasks& masks) {
  constexpr int kMost = Numbers::kExact ? 2 : 3;
#pragma unroll 1
  for (int chunk = 0;; ++chunk) {
    const bool odd = (thread_index() & 32) != 0;
    const int n_tiles = head.first.n_tiles, middle = (n_tiles + 1) / 2;
    const int each = ceil_div(middle, ceil_div(middle, kMost)), n0 = (odd ? middle : 0) + chunk * each;
    const int count = min(each, (odd ? n_tiles : middle) - n0);
    if (count <= 0) break;
    if (count == 1) first_tiles<Numbers, kMasks, 1>(bank, head, images, y, n0, shared, masks);
    if (count == 2) first_tiles<Numbers, kMasks, 2>(bank, head, images, y, n0, shared, masks);
    if (count == 3) first_tiles<Numbers, kMasks, kMost>(bank, head, images, y, n0, shared, masks);
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
template <int kStride, int kPlane, class Numbers>
__device__ __forceinline__ void hand_over(const Sums<Numbers>& sums, const Share& share, int columns, int pixel0,
                                          __half* operand) {
#pragma unroll
  for (int u = 0; u < Numbers::kColumns; ++u) {
    if (share.column + u < columns) {
      store_operand(operand + (pixel0 + share.column + u) * kStride + 2 * share.pair, kPlane, sums.value[0][u]);
    }
  }
}

// One warp's part of a pointwise layer: kM tiles of 16 pixels from `m` on by kN tiles of eight channels from `n` on.
template <class Numbers, int kM, int kN, int kStride, int kPlane, class Store>
__device__ __forceinline__ void mix_tiles(const BankRef& bank, const MatrixRecord& matrix, const __half* operand, int m,
                                          int m_tiles, int n, const Store& store) {
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
      const __half* from = operand + (min(m + i, m_tiles - 1) * 16 + (lane & 15)) * kStride + k * 16 + (lane >> 4) * 8;
      std::uint32_t a[kPlanes][4];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) ldmatrix_x4(a[p], from + p * kPlane);
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
    const float4 f = bank.at<float4>(matrix.outputs)[pair];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      if (m + i >= m_tiles) continue;
      const int pixel = (m + i) * 16 + (own >> 2);
      store(pixel, pair, fmaf(sum[i][j][0], f.x, f.z), fmaf(sum[i][j][1], f.y, f.w));
      store(pixel + 8, pair, fmaf(sum[i][j][2], f.x, f.z), fmaf(sum[i][j][3], f.y, f.w));
    }
  }
}

// A pointwise layer: operands [pixels, K] in shared memory times a matrix. `store(pixel, pair, x, y)` gets a pair of
// output channels, by all lanes of a warp together. A warp takes kM tiles of pixels by up to kN of channels.
template <class Numbers, int kM, int kN, int kStride, int kPlane, class Store>
__device__ __forceinline__ void mix(const BankRef& bank, const MatrixRecord& matrix, const __half* operand, int pixels,
                                    const Store& store) {
  static_assert(kN <= 3, "one case below for each count");
  constexpr int kWarps = Numbers::kThreads / 32;
  const int m_tiles = ceil_div(pixels, 16), groups = ceil_div(m_tiles, kM);
  const int wanted = max(ceil_div(matrix.n_tiles, kN), min(matrix.n_tiles, ceil_div(kWarps, groups)));
  const int each = ceil_div(matrix.n_tiles, wanted), chunks = ceil_div(matrix.n_tiles, each);
#pragma unroll 1
  for (int task = thread_index() >> 5; task < groups * chunks; task += kWarps) {
    const int group = task / chunks, n = (task - group * chunks) * each, m = group * kM;
    const int count = min(each, matrix.n_tiles - n);
    if (count == 1) {
      mix_tiles<Numbers, kM, 1, kStride, kPlane>(bank, matrix, operand, m, m_tiles, n, store);
    } else if (count == 2) {
      mix_tiles < Numbers, kM, kN<2 ? kN : 2, kStride, kPlane>(bank, matrix, operand, m, m_tiles, n, store);
    } else {
      mix_tiles<Numbers, kM, kN, kStride, kPlane>(bank, matrix, operand, m, m_tiles, n, store);
    }
  }
}

// Columns outside a map are zeros: one on the left, the others on the right of the `used` ones.
template <int kCount, int kRow, int kStride, class Pair>
__device__ __forceinline__ void clear_margins(Pair* rows, int used) {
  const int margin = (kRow - used) * kStride;
#pragma unroll 1
  for (int i = thread_index(); i < kCount * margin; i += static_cast<int>(blockDim.x)) {
    const int line = i / margin, rest = i - line * margin;
    set_zero(rows[line * kRow * kStride + rest + (rest < kStride ? 0 : used * kStride)]);
  }
}

// What one call of run_head does: rows begin .. end - 1 of the third map [height / 4, width / 4, channels2] of one image.
struct HeadJob {
  const uint4* image;  // prepared
  std::int32_t planes;
  float* map;
  HeadMasks masks;
  std::int32_t begin, end;
};

// Ends with a barrier. The job lies in shared memory and addresses are worked out anew in every phase: what would
// otherwise be kept in registers over the whole loop leaves too few for the sums.
template <class Numbers, bool kMasks>
__device__ __forceinline__ void run_head(const BankRef& bank, const ModelRecord& model, const ImagesRef& images,
                                         unsigned char* shared, const HeadJob& job) {
  using Pair = typename Numbers::Pair;
  using Shape = HeadShape<Numbers>;
  constexpr int kRows = Numbers::kRows;
  const HeadRecord& head = model.head;
  const int height = images.height, width1 = images.width / 2, width2 = images.width / 4;
  Pair* first = reinterpret_cast<Pair*>(shared);
  Pair* second = first;
  __half* operand1 = reinterpret_cast<__half*>(shared + Shape::kOperand1);
  __half* operand2 = reinterpret_cast<__half*>(shared + Shape::kOperand2);
  Pair* parked = reinterpret_cast<Pair*>(shared + Shape::kParked);
  Sums<Numbers> sums1, sums2;
  sums1.clear();
  sums2.clear();
  if (Numbers::kParked) sums2.park(parked);

  // Step v holds rows kRows v .. of the first map; they complete rows kRows / 2 v - 1 .. of the second one.
  int v = max(0, (4 * job.begin - 3 + kRows) / kRows - 1);
  fetch_rows<Numbers>(job.image, height, job.planes, kRows * v, shared);
  copy_async_wait<0>();
  __syncthreads();
#pragma unroll 1
  for (; v <= (4 * job.end + 4) / kRows; ++v) {
    clear_margins<kRows, Shape::kRow1, Shape::kStride1>(first, images.width);
    first_rows<Numbers, kMasks>(bank, head, images, kRows * v, shared, job.masks);
    __syncthreads();

    {
      const Share share(head.taps1, head.first.n_tiles * 4, Numbers::kColumns, width1);
      if (share.any) {
        const Pair* taps = taps_at(bank, head.taps1, Pair()) + share.pair;
        const Pair* row = first + 2 * share.column * Shape::kStride1 + share.pair;
#pragma unroll 1
        for (int r = 0; r < kRows; r += 2) {
          if (kRows * v + r < height && share.live) {
            sums1.template add<false, Shape::kStride1, kMaxPairs1>(row + r * Shape::kRow1 * Shape::kStride1, taps);
            sums1.template add<true, Shape::kStride1, kMaxPairs1>(row + (r + 1) * Shape::kRow1 * Shape::kStride1, taps);
          }
          hand_over<Shape::kOperandStride1, Shape::kOperandPlane1>(sums1, share, width1, r / 2 * width1, operand1);
          sums1.advance();
        }
      }
    }
    __syncthreads();

    const int row1 = kRows / 2 * v - 1;  // of the second map, the first that is complete now
    if (row1 + kRows / 2 > 0 && row1 < height / 2) {
      clear_margins<kRows / 2, Shape::kRow2, Shape::kStride2>(second, width1);
      mix<Numbers, Numbers::kExact ? 1 : kRows / 2, 3, Shape::kOperandStride1, Shape::kOperandPlane1>(
          bank, head.mix1, operand1, kRows / 2 * width1, [&](int pixel, int pair, float x, float y) {
            const int line = pixel >= width1 ? 1 : 0, column = pixel - line * width1;
            const bool inside = pixel < kRows / 2 * width1;
            if (inside) store_relu(second + (line * Shape::kRow2 + column + 1) * Shape::kStride2 + pair, x, y);
            if (kMasks) {
              const int lane = thread_index() & 31;
              const std::uint32_t byte = mask_byte(x, y, lane);
              const int row = row1 + line;
              if (inside && (lane & 3) == 0 && row >= 0 && row < height / 2) {
                job.masks.second[(row * width1 + column) * head.mix1.n_tiles + pair / 4] =
                    static_cast<std::uint8_t>(byte);
              }
            }
          });
    }
    __syncthreads();

    if (v < (4 * job.end + 4) / kRows) fetch_rows<Numbers>(job.image, height, job.planes, kRows * (v + 1), shared);
    int complete = -1;  // row of the third map whose operands are ready
    {
      const Share share(head.taps2, head.mix1.n_tiles * 4, Numbers::kColumns, width2);
      const Pair* taps = taps_at(bank, head.taps2, Pair()) + share.pair;
      const Pair* line = second + 2 * share.column * Shape::kStride2 + share.pair;
      if (Numbers::kParked) sums2.fetch(parked);
#pragma unroll 1
      for (int row = max(row1, 0); row < row1 + kRows / 2; ++row) {
        const Pair* from = line + (row - row1) * Shape::kRow2 * Shape::kStride2;
        const bool odd = row % 2 != 0, there = share.live && row < height / 2;
        if (there && odd) sums2.template add<true, Shape::kStride2, kMaxPairs2>(from, taps);
        if (there && !odd) sums2.template add<false, Shape::kStride2, kMaxPairs2>(from, taps);
        if (!odd) continue;
        const int row2 = (row - 3) / 2;
        if (row >= 3 && row2 >= job.begin && row2 < job.end) {
          complete = row2;
          if (share.any) {
            hand_over<Shape::kOperandStride2, Shape::kOperandPlane2>(sums2, share, width2, 0, operand2);
          }
        }
        sums2.advance();
      }
      if (Numbers::kParked) sums2.park(parked);
    }
    copy_async_wait<0>();
    __syncthreads();

    if (complete >= 0) {
      const int channels = head.channels2;
      float* to = job.map + complete * width2 * channels;
      mix<Numbers, 1, 1, Shape::kOperandStride2, Shape::kOperandPlane2>(
          bank, head.mix2, operand2, width2, [&](int pixel, int pair, float x, float y) {
            if (pixel >= width2) return;
            float* here = to + pixel * channels + 2 * pair;
            if (2 * pair < channels) here[0] = relu(x);
            if (2 * pair + 1 < channels) here[1] = relu(y);
          });
      __syncthreads();
    }
  }
}

}  // namespace cortexloop::cuda
