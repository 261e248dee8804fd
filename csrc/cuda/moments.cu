// One batch of features joins running moments: means, squared deviations, and products with the deviations of responses.
//
//   cross[t, c] += sum_i centred[i, t] (x[i, c] - xb[c]) + f shift[t] d[c]      xb: weighted mean of the batch
//   m2[c]       += sum_i w[i] (x[i, c] - xb[c])^2 + f d[c]^2                    d = xb - mean
//   mean[c]     += d[c] batch / (before + batch)                                f = before batch / (before + batch)
//
// Work:      a block owns kColumns columns, and with them every number that is updated: no atomics, one order of summation.
// Reading:   a batch is read once for every kNeurons responses, whatever its size. The product is summed with x - origin, where
//            `origin` is the mean of the first rows, and corrected at the end by sum_i centred[i, t] (origin - xb), which
//            rounding alone keeps from being 0. So nothing waits for xb, and a column that is constant has x - origin = 0.
// Memory:    rows come in chunks of kRows by asynchronous copies into a ring of kStages places. A row of features is 8 numbers
//            longer there than kColumns, one of responses than kNeurons: the lanes of a fragment fall on 32 banks.
//            float32: 3 x (17 + 9.1) KiB + 1.75 KiB = 80.1 KiB, two blocks on a multiprocessor of compute capability 8.0, 9.0
//            and 10.0, one where 99 KiB is all; float16 and bfloat16: 54.6 KiB.
// Precision: a float32 number is the sum of two tf32 numbers to 2^-23; three products of tensor cores are one of float32. They
//            sum the products of a chunk, whose sums are then added in float32 as usual: tensor cores round toward zero,
//            which over thousands of images would show. Sums of w (x - origin) and w (x - origin)^2: float32 over 8 rows, then
//            float64.
// Warp:      32 columns by all kNeurons, so that every feature is split once; 64 sums and as many of the chunk a thread.
//
// Floor for D = 200,704, N = 3000 in one batch, T = 64, on an H200: 2.41 GB of features at 4.3 TB/s are 0.56 ms; cross, read and
// written, adds 0.1 GB (0.02 ms). Products: 3 x 77 GFLOP are 0.47 ms at 495 TFLOP/s, 0.78 ms at the 60 % of it that mma.sync is
// said to reach. Instructions: about 290 for the 48 products of a step of a warp, 0.73 ms. Shared memory: 24 words of fragments a
// lane for 48 products, half of its bandwidth then.
// Prediction, before any run: 0.8 to 1.1 ms, bound by tensor cores and instructions; 64 images to a batch, where cross is two
// thirds of the bytes, 45 to 60 us against a floor of 36 us. Batches of 512 and more hide the updates.
#include "cortexloop/moments.h"

#include "launch.h"

namespace cortexloop::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 128;  // of a block; a warp takes kThreads / 4
constexpr int kNeurons = 64;
constexpr int kRows = 32;  // of a chunk; of which the origin is the mean, at most
constexpr int kStages = 3;
constexpr int kColumnTiles = 4, kNeuronTiles = kNeurons / 16, kSteps = kRows / 8;
static_assert(kColumns == kThreads && kThreads / 32 == kNeuronTiles,
              "a thread looks after a column, a warp after a tile");

struct Bfloat16 {
  std::uint16_t bits;
};

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(Bfloat16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}

// Where things lie in shared memory, bytes; lengths of rows in numbers.
template <class Element>
struct MomentsShape {
  static constexpr int kFeatureRow = kColumns + 8, kCentredRow = kNeurons + 8;
  static constexpr int kCentred = kRows * kFeatureRow * static_cast<int>(sizeof(Element));  // in a place of the ring
  static constexpr int kWeights = kCentred + kRows * kCentredRow * 4;
  static constexpr int kPlace = kWeights + kRows * 4;
  static constexpr int kColumnSums = kStages * kPlace;
  static constexpr int kBytes = kColumnSums + 3 * kColumns * 4 + kNeurons * 4;
  static_assert(kCentred % 16 == 0 && kPlace % 16 == 0, "rows are copied 16 bytes at a time");
  static_assert(2 * (kBytes + 1024) <= 164 * 1024, "two blocks on compute capability 8.0");
  static_assert(kBytes <= 99 * 1024, "one block on every device");
};

// By value.
struct MomentsTask {
  FeatureMomentsArgs args;
  double factor, share;          // f, and batch / (before + batch)
  std::int32_t sample;           // rows that `origin` is the mean of, a power of two
  std::int32_t feature_vectors;  // whether rows begin at multiples of 16 bytes
  std::int32_t centred_vectors;
  std::int32_t cross_pairs;  // whether pairs of neighbours lie at multiples of 8 bytes
};

// Starts to copy kRows rows, from row0 on, of kWidth columns, from column0 on, of a matrix; numbers outside become zero.
template <int kWidth, int kRow, class T>
__device__ __forceinline__ void fetch_matrix(const T* matrix, std::int64_t rows, std::int64_t columns,
                                             std::int64_t row0, std::int64_t column0, bool vectors, T* to) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(T)), kTogether = kThreads / (kWidth / kEach);  // rows at a time
  static_assert(kThreads % (kWidth / kEach) == 0 && kRows % kTogether == 0, "a thread keeps to its columns");
  if (vectors) {
    const int first = thread_index() / (kWidth / kEach), column = thread_index() % (kWidth / kEach) * kEach;
    const std::int64_t rows_left = column0 + column < columns ? rows - row0 - first : 0;
    const T* from = matrix + (row0 + first) * columns + column0 + column;
    to += first * kRow + column;
#pragma unroll
    for (int row = 0; row < kRows; row += kTogether) {
      const bool inside = row < rows_left;
      copy_async_16(to + row * kRow, inside ? from : matrix, inside ? 16 : 0);
      from += kTogether * columns;
    }
    return;
  }
#pragma unroll 1
  for (int i = thread_index(); i < kRows * kWidth; i += kThreads) {
    const int row = i / kWidth, column = i % kWidth;
    const bool inside = row0 + row < rows && column0 + column < columns;
    const T* from = inside ? matrix + (row0 + row) * columns + column0 + column : matrix;
    if constexpr (sizeof(T) == 4) {
      copy_async_4(to + row * kRow + column, from, inside ? 4 : 0);
    } else {
      to[row * kRow + column] = inside ? *from : T{};
    }
  }
}

template <class Element>
__device__ __forceinline__ void fetch_chunk(const MomentsTask& task, std::int64_t chunk, std::int64_t column0,
                                            std::int64_t neuron0, unsigned char* place) {
  using Shape = MomentsShape<Element>;
  const FeatureMomentsArgs& a = task.args;
  const std::int64_t row0 = chunk * kRows;
  fetch_matrix<kColumns, Shape::kFeatureRow>(static_cast<const Element*>(a.features), a.images, a.columns, row0,
                                             column0, task.feature_vectors != 0, reinterpret_cast<Element*>(place));
  fetch_matrix<kNeurons, Shape::kCentredRow>(a.centred, a.images, a.neurons, row0, neuron0, task.centred_vectors != 0,
                                             reinterpret_cast<float*>(place + Shape::kCentred));
  const int row = thread_index();
  if (row >= kRows) return;
  float* weight = reinterpret_cast<float*>(place + Shape::kWeights) + row;
  const bool inside = row0 + row < a.images;
  if (a.weights == nullptr) {
    *weight = inside ? 1.0f : 0.0f;
  } else {
    copy_async_4(weight, inside ? a.weights + row0 + row : a.weights, inside ? 4 : 0);
  }
}

// x = high + low but for 2^-23 of x, both with zeros where tf32 has no bits. NaN and infinity become NaN in one of them.
__device__ __forceinline__ void split(float x, std::uint32_t* high, std::uint32_t* low) {
  constexpr std::uint32_t kBits = 0xffffe000u, kHalfPlace = 0x1000u;
  *high = (__float_as_uint(x) + kHalfPlace) & kBits;
  *low = __float_as_uint(x - __uint_as_float(*high)) & kBits;
}

// The sum over the four lanes that share lane / 4, the same in all of them.
__device__ __forceinline__ double sum_of_four(double x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What a thread sums over the images. Columns: warp * 32 + 8 j + lane / 4, rows that are lane % 4 modulo 4.
struct MomentsSums {
  float cross[kNeuronTiles][kColumnTiles][4];
  double first[kColumnTiles], second[kColumnTiles];  // w (x - origin), w (x - origin)^2
  double centred[2];                                 // of two neurons of tile `warp`

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      first[j] = second[j] = 0.0;
#pragma unroll
      for (int m = 0; m < kNeuronTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) cross[m][j][e] = 0.0f;
      }
    }
    centred[0] = centred[1] = 0.0;
  }
};

// Adds one chunk.
template <class Element>
__device__ __forceinline__ void add_chunk(const unsigned char* place, const float (&origin)[kColumnTiles], int tiles,
                                          MomentsSums* sums) {
  using Shape = MomentsShape<Element>;
  const int lane = thread_index() & 31, warp = thread_index() >> 5, g = lane >> 2, t = lane & 3;
  const Element* x = reinterpret_cast<const Element*>(place) + t * Shape::kFeatureRow + warp * 32 + g;
  const float* c = reinterpret_cast<const float*>(place + Shape::kCentred) + t * Shape::kCentredRow + g;
  const float* w = reinterpret_cast<const float*>(place + Shape::kWeights) + t;
  float cross[kNeuronTiles][kColumnTiles][4], first[kColumnTiles], second[kColumnTiles], centred[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    first[j] = second[j] = 0.0f;
#pragma unroll
    for (int m = 0; m < kNeuronTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) cross[m][j][e] = 0.0f;
    }
  }
#pragma unroll 1
  for (int k = 0; k < kSteps; ++k) {
    std::uint32_t b_high[kColumnTiles][2], b_low[kColumnTiles][2];
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float value = as_float(x[4 * h * Shape::kFeatureRow + 8 * j]) - origin[j];
        const float weighted = w[4 * h] * value;
        first[j] += weighted;
        second[j] = fmaf(weighted, value, second[j]);
        split(value, &b_high[j][h], &b_low[j][h]);
      }
    }
#pragma unroll
    for (int m = 0; m < kNeuronTiles; ++m) {
      if (m >= tiles) continue;
      const float* at = c + 16 * m;
      const float values[4] = {at[0], at[8], at[4 * Shape::kCentredRow], at[4 * Shape::kCentredRow + 8]};
      if (m == warp) {
        centred[0] += values[0] + values[2];
        centred[1] += values[1] + values[3];
      }
      std::uint32_t a_high[4], a_low[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) split(values[e], &a_high[e], &a_low[e]);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) mma_1688(cross[m][j], a_low, b_high[j]);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) mma_1688(cross[m][j], a_high, b_low[j]);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) mma_1688(cross[m][j], a_high, b_high[j]);
    }
    x += 8 * Shape::kFeatureRow;
    c += 8 * Shape::kCentredRow;
    w += 8;
  }
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    sums->first[j] += first[j];
    sums->second[j] += second[j];
#pragma unroll
    for (int m = 0; m < kNeuronTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums->cross[m][j][e] += cross[m][j][e];
    }
  }
  sums->centred[0] += centred[0];
  sums->centred[1] += centred[1];
}

// For each column of the block: origin - xb and f d, and for each neuron the sum of `centred`, to shared memory. With
// `last`, the column's mean and m2 are updated.
__device__ __forceinline__ void finish_columns(const MomentsTask& task, std::int64_t column0,
                                               const float (&origin)[kColumnTiles], const MomentsSums& sums, bool last,
                                               float* offset, float* jump, float* centred) {
  const int lane = thread_index() & 31, warp = thread_index() >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const double first = sum_of_four(sums.first[j]), second = sum_of_four(sums.second[j]);
    const int own = warp * 32 + 8 * j + g;
    const std::int64_t column = column0 + own;
    if (t != j || column >= task.args.columns) continue;
    const double from_origin = first / task.args.batch;
    const double mean = task.args.mean[column], d = static_cast<double>(origin[j]) + from_origin - mean;
    offset[own] = static_cast<float>(-from_origin);
    jump[own] = static_cast<float>(task.factor * d);
    if (last) {
      const double spread = second - first * from_origin;  // below 0 by rounding only
      task.args.m2[column] += (spread < 0.0 ? 0.0 : spread) + task.factor * d * d;
      task.args.mean[column] = mean + d * task.share;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const double sum = sum_of_four(sums.centred[h]);
    if (t == 0) centred[16 * warp + 8 * h + g] = static_cast<float>(sum);
  }
}

template <class Element>
__global__ __launch_bounds__(kThreads, 2) void feature_moments_kernel(MomentsTask task) {
  using Shape = MomentsShape<Element>;
  CORTEXLOOP_SHARED(shared);
  float* origins = reinterpret_cast<float*>(shared + Shape::kColumnSums);
  float *offset = origins + kColumns, *jump = offset + kColumns, *centred = jump + kColumns;
  const FeatureMomentsArgs& a = task.args;
  const std::int64_t column0 = static_cast<std::int64_t>(blockIdx.x) * kColumns;
  const std::int64_t chunks = (a.images + kRows - 1) / kRows;
  const int lane = thread_index() & 31, warp = thread_index() >> 5, g = lane >> 2, t = lane & 3;
  float origin[kColumnTiles] = {};
  MomentsSums sums;
#pragma unroll 1
  for (std::int64_t neuron0 = 0; neuron0 < a.neurons; neuron0 += kNeurons) {
    const auto left = static_cast<int>(min(a.neurons - neuron0, static_cast<std::int64_t>(kNeurons)));
    const int tiles = (left + 15) / 16;
    sums.clear();
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < chunks) fetch_chunk<Element>(task, s, column0, neuron0, shared + s * Shape::kPlace);
      copy_async_commit();
    }
    int place = 0, next = kStages - 1;
#pragma unroll 1
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // the chunk is there for all, and nobody reads the one before any more
      if (chunk + kStages - 1 < chunks) {
        fetch_chunk<Element>(task, chunk + kStages - 1, column0, neuron0, shared + next * Shape::kPlace);
      }
      copy_async_commit();
      if (chunk == 0 && neuron0 == 0) {
        const Element* x = reinterpret_cast<const Element*>(shared) + thread_index();
        const float first = as_float(*x);
        float sum = 0.0f;
#pragma unroll 1
        for (int i = 1; i < task.sample; ++i) sum += as_float(x[i * Shape::kFeatureRow]) - first;
        origins[thread_index()] = first + sum / static_cast<float>(task.sample);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) origin[j] = origins[warp * 32 + 8 * j + g];
      }
      add_chunk<Element>(shared + place * Shape::kPlace, origin, tiles, &sums);
      place = place + 1 == kStages ? 0 : place + 1;
      next = next + 1 == kStages ? 0 : next + 1;
    }
    finish_columns(task, column0, origin, sums, neuron0 + kNeurons >= a.neurons, offset, jump, centred);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kNeuronTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = 16 * m + 8 * h + g;
        if (own >= left) continue;
        const float rest = centred[own], moved = a.shift[neuron0 + own];
        float* row = a.cross + (neuron0 + own) * a.columns + column0;
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const int column = warp * 32 + 8 * j + 2 * t;
          if (column0 + column >= a.columns) continue;
          const float u = fmaf(moved, jump[column], fmaf(rest, offset[column], sums.cross[m][j][2 * h]));
          const float v = fmaf(moved, jump[column + 1], fmaf(rest, offset[column + 1], sums.cross[m][j][2 * h + 1]));
          if (task.cross_pairs != 0) {
            const float2 before = *reinterpret_cast<const float2*>(row + column);
            *reinterpret_cast<float2*>(row + column) = make_float2(before.x + u, before.y + v);
          } else {
            row[column] += u;
            if (column0 + column + 1 < a.columns) row[column + 1] += v;
          }
        }
      }
    }
  }
}

template <class Element>
Status launch_moments(const MomentsTask& task, cudaStream_t stream) {
  const std::int64_t blocks = (task.args.columns + kColumns - 1) / kColumns;
  return launch("feature_moments_kernel", feature_moments_kernel<Element>, dim3(static_cast<unsigned>(blocks)),
                kThreads, MomentsShape<Element>::kBytes, stream, task);
}

bool aligned_to(const void* address, std::int64_t row_bytes, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % static_cast<std::uintptr_t>(bytes) == 0 && row_bytes % bytes == 0;
}

}  // namespace

Status feature_moments(const FeatureMomentsArgs& args, int device, void* stream) {
  if (args.images < 1 || args.columns < 1 || args.neurons < 1) {
    return fail(Status::invalid_argument,
                "feature_moments: %lld images, %lld columns and %lld neurons, 1 at least expected",
                static_cast<long long>(args.images), static_cast<long long>(args.columns),
                static_cast<long long>(args.neurons));
  }
  if (args.columns > (std::int64_t{1} << 31) * (kColumns / 2)) {
    return fail(Status::invalid_argument, "feature_moments: %lld columns are more than one launch takes",
                static_cast<long long>(args.columns));
  }
  if (!(args.batch > 0.0) || !(args.before >= 0.0)) {
    return fail(Status::invalid_argument, "feature_moments: weights of %g before and %g in the batch", args.before,
                args.batch);
  }
  MomentsTask task = {};
  task.args = args;
  task.share = args.batch / (args.before + args.batch);
  task.factor = args.before * task.share;
  task.sample = 1;
  while (task.sample < kRows && 2 * task.sample <= args.images) task.sample *= 2;
  task.feature_vectors = aligned_to(args.features, args.columns * (args.type == FeatureType::f32 ? 4 : 2), 16);
  task.centred_vectors = aligned_to(args.centred, args.neurons * 4, 16);
  task.cross_pairs = aligned_to(args.cross, args.columns * 4, 8);
  const DeviceGuard guard(device);
  if (guard.status() != Status::ok) return guard.status();
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.type) {
    case FeatureType::f32: return launch_moments<float>(task, on);
    case FeatureType::f16: return launch_moments<__half>(task, on);
    case FeatureType::bf16: return launch_moments<Bfloat16>(task, on);
  }
  return fail(Status::invalid_argument, "feature_moments: unknown type of features");
}

}  // namespace cortexloop::cuda
