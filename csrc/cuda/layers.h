// Layers one at a time, in float32, on whole maps [height, width, channels] that lie in shared or device memory: whatever
// follows a head, and every layer of a model that has none. All threads of the block call these functions; each ends
// with a barrier.
#pragma once

#include "numbers.h"

namespace cortexloop::cuda {

constexpr int kSpan = 4;  // neighbouring output columns of one thread in a depthwise layer

__host__ __device__ inline std::int64_t in_floats(const LayerRecord& layer) {
  return static_cast<std::int64_t>(layer.in_h) * layer.in_w * layer.in_c;
}
__host__ __device__ inline std::int64_t out_floats(const LayerRecord& layer) {
  return static_cast<std::int64_t>(layer.out_h) * layer.out_w * layer.out_c;
}
__host__ __device__ inline std::int64_t depthwise_floats(const LayerRecord& layer) {
  return static_cast<std::int64_t>(layer.out_h) * layer.out_w * layer.in_c;
}

// The first layer: a full convolution of an image.
__device__ inline void full_forward(const BankRef& bank, const LayerRecord& layer, const ImagesRef& images,
                                    std::int64_t image, const float* mean, float* out) {
  const float* weights = bank.at<float>(layer.spatial);
  const float* bias = bank.at<float>(layer.bias);
  const int k = layer.kernel, total = static_cast<int>(out_floats(layer));
  for (int i = static_cast<int>(threadIdx.x); i < total; i += static_cast<int>(blockDim.x)) {
    const int pixel = i / layer.out_c, o = i - pixel * layer.out_c;
    const int y = pixel / layer.out_w, x = pixel - y * layer.out_w;
    const int top = y * layer.stride - layer.pad_top, left = x * layer.stride - layer.pad_left;
    float sum = 0.0f;
    for (int dy = max(0, -top); dy < min(k, layer.in_h - top); ++dy) {
      for (int dx = max(0, -left); dx < min(k, layer.in_w - left); ++dx) {
        for (int c = 0; c < 3; ++c) {
          sum = fmaf(images.value(image, top + dy, left + dx, c, mean),
                     __ldg(weights + ((dy * k + dx) * 3 + c) * layer.out_c + o), sum);
        }
      }
    }
    out[i] = relu(sum + __ldg(bias + o));
  }
  __syncthreads();
}

// Depthwise part of a separable layer: in -> between [out_h, out_w, in_c].
//
// kSize 0 reads kernel and stride from the record. Otherwise the stride is 1 and a thread keeps a window of its row.
template <int kSize>
__device__ inline void depthwise_forward(const BankRef& bank, const LayerRecord& layer, const float* in,
                                         float* between) {
  const float* taps = bank.at<float>(layer.spatial);
  const int k = kSize != 0 ? kSize : layer.kernel, stride = kSize != 0 ? 1 : layer.stride, channels = layer.in_c;
  const int spans = (layer.out_w + kSpan - 1) / kSpan, total = layer.out_h * spans * channels;
  for (int i = static_cast<int>(threadIdx.x); i < total; i += static_cast<int>(blockDim.x)) {
    const int span = i / channels, c = i - span * channels;
    const int y = span / spans, x = (span - y * spans) * kSpan;
    const int top = y * stride - layer.pad_top, left = x * stride - layer.pad_left;
    float sum[kSpan] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int dy = max(0, -top); dy < min(k, layer.in_h - top); ++dy) {
      const float* row = in + ((top + dy) * layer.in_w + left) * channels + c;
      const float* tap = taps + dy * k * channels + c;
      if constexpr (kSize != 0) {
        float window[kSpan + kSize - 1];
#pragma unroll
        for (int j = 0; j < kSpan + kSize - 1; ++j) {
          window[j] = left + j >= 0 && left + j < layer.in_w ? row[j * channels] : 0.0f;
        }
#pragma unroll
        for (int dx = 0; dx < kSize; ++dx) {
          const float weight = __ldg(tap + dx * channels);
#pragma unroll
          for (int u = 0; u < kSpan; ++u) sum[u] = fmaf(window[u + dx], weight, sum[u]);
        }
      } else {
#pragma unroll 1
        for (int dx = 0; dx < k; ++dx) {
          const float weight = __ldg(tap + dx * channels);
#pragma unroll
          for (int u = 0; u < kSpan; ++u) {
            const int j = u * stride + dx;
            if (left + j >= 0 && left + j < layer.in_w) sum[u] = fmaf(row[j * channels], weight, sum[u]);
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kSpan; ++u) {
      if (x + u < layer.out_w) between[(y * layer.out_w + x + u) * channels + c] = sum[u];
    }
  }
  __syncthreads();
}

// Pointwise part, bias and ReLU: between -> out.
__device__ inline void pointwise_forward(const BankRef& bank, const LayerRecord& layer, const float* between,
                                         float* out) {
  const float* weights = bank.at<float>(layer.pointwise);
  const float* bias = bank.at<float>(layer.bias);
  const int total = static_cast<int>(out_floats(layer));
  for (int i = static_cast<int>(threadIdx.x); i < total; i += static_cast<int>(blockDim.x)) {
    const int pixel = i / layer.out_c, o = i - pixel * layer.out_c;
    const float* from = between + pixel * layer.in_c;
    float sum = 0.0f;
    for (int c = 0; c < layer.in_c; ++c) sum = fmaf(from[c], __ldg(weights + c * layer.out_c + o), sum);
    out[i] = relu(sum + __ldg(bias + o));
  }
  __syncthreads();
}

__device__ inline void separable_forward(const BankRef& bank, const LayerRecord& layer, const float* in, float* between,
                                         float* out) {
  if (layer.kernel == 5 && layer.stride == 1) {
    depthwise_forward<5>(bank, layer, in, between);
  } else {
    depthwise_forward<0>(bank, layer, in, between);
  }
  pointwise_forward(bank, layer, between, out);
}

// Sum over the block, the same for every thread; `shared` has room for kMaxWarps numbers. Ends with a barrier.
template <class Join>
__device__ __forceinline__ float block_reduce(float x, float* shared, const Join& join) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, distance));
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = shared[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) x = join(x, shared[w]);
  __syncthreads();
  return x;
}

// The response from the last map.
__device__ inline float read_out(const BankRef& bank, const ModelRecord& model, const float* last, float* shared) {
  const float* weights = bank.at<float>(model.readout);
  const int total = static_cast<int>(out_floats(model.layers[model.depth - 1]));
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < total; i += static_cast<int>(blockDim.x))
    sum = fmaf(last[i], __ldg(weights + i), sum);
  return block_reduce(sum, shared, [](float a, float b) { return a + b; }) + model.readout_bias;
}

// The layers of `model.rest`; `in` is the map they start from. Returns the last map.
__device__ inline const float* rest_forward(const BankRef& bank, const ModelRecord& model, const float* in,
                                            float* rest) {
  for (int l = model.rest.begin; l < model.depth; ++l) {
    float* out = rest + model.layers[l].rest;
    separable_forward(bank, model.layers[l], in, rest + model.rest.between, out);
    in = out;
  }
  return in;
}

// --- Gradients. `grad` of a map is with respect to the map before ReLU, so masked. ----------------------------------

// Gradient of the last map: cotangent * readout where the map is positive.
__device__ inline void read_out_backward(const BankRef& bank, const ModelRecord& model, const float* last,
                                         float cotangent, float* grad) {
  const float* weights = bank.at<float>(model.readout);
  const int total = static_cast<int>(out_floats(model.layers[model.depth - 1]));
  for (int i = static_cast<int>(threadIdx.x); i < total; i += static_cast<int>(blockDim.x)) {
    grad[i] = last[i] > 0.0f ? cotangent * __ldg(weights + i) : 0.0f;
  }
  __syncthreads();
}

// grad of a separable layer's output -> grad of its input map `in`.
__device__ inline void separable_backward(const BankRef& bank, const LayerRecord& layer, const float* grad,
                                          const float* in, float* between, float* grad_in) {
  const float* weights = bank.at<float>(layer.pointwise);
  const float* taps = bank.at<float>(layer.spatial);
  const int k = layer.kernel, channels = layer.in_c, stride = layer.stride;
  int total = static_cast<int>(depthwise_floats(layer));
  for (int i = static_cast<int>(threadIdx.x); i < total; i += static_cast<int>(blockDim.x)) {
    const int pixel = i / channels, c = i - pixel * channels;
    const float* from = grad + pixel * layer.out_c;
    float sum = 0.0f;
    for (int o = 0; o < layer.out_c; ++o) sum = fmaf(from[o], __ldg(weights + c * layer.out_c + o), sum);
    between[i] = sum;
  }
  __syncthreads();
  total = static_cast<int>(in_floats(layer));
  for (int i = static_cast<int>(threadIdx.x); i < total; i += static_cast<int>(blockDim.x)) {
    const int pixel = i / channels, c = i - pixel * channels;
    const int y = pixel / layer.in_w, x = pixel - y * layer.in_w;
    float sum = 0.0f;
    if (in[i] > 0.0f) {
      for (int dy = (y + layer.pad_top) % stride; dy < k; dy += stride) {
        const int row = (y + layer.pad_top - dy) / stride;
        if (y + layer.pad_top < dy || row >= layer.out_h) continue;
        for (int dx = (x + layer.pad_left) % stride; dx < k; dx += stride) {
          const int column = (x + layer.pad_left - dx) / stride;
          if (x + layer.pad_left < dx || column >= layer.out_w) continue;
          sum = fmaf(between[(row * layer.out_w + column) * channels + c], __ldg(taps + (dy * k + dx) * channels + c),
                     sum);
        }
      }
    }
    grad_in[i] = sum;
  }
  __syncthreads();
}

// grad of the first layer's output -> gradient of the image; `write(y, x, c, value)` gets every number once.
template <class Write>
__device__ inline void full_backward(const BankRef& bank, const LayerRecord& layer, const float* grad,
                                     const Write& write) {
  const float* weights = bank.at<float>(layer.spatial);
  const int k = layer.kernel, stride = layer.stride, total = layer.in_h * layer.in_w * 3;
  for (int i = static_cast<int>(threadIdx.x); i < total; i += static_cast<int>(blockDim.x)) {
    const int pixel = i / 3, c = i - pixel * 3;
    const int y = pixel / layer.in_w, x = pixel - y * layer.in_w;
    float sum = 0.0f;
    for (int dy = (y + layer.pad_top) % stride; dy < k; dy += stride) {
      const int row = (y + layer.pad_top - dy) / stride;
      if (y + layer.pad_top < dy || row >= layer.out_h) continue;
      for (int dx = (x + layer.pad_left) % stride; dx < k; dx += stride) {
        const int column = (x + layer.pad_left - dx) / stride;
        if (x + layer.pad_left < dx || column >= layer.out_w) continue;
        const float* from = grad + (row * layer.out_w + column) * layer.out_c;
        const float* w = weights + ((dy * k + dx) * 3 + c) * layer.out_c;
        for (int o = 0; o < layer.out_c; ++o) sum = fmaf(from[o], __ldg(w + o), sum);
      }
    }
    write(y, x, c, sum);
  }
  __syncthreads();
}

// The layers of `model.rest` backwards, from the cotangent to the gradient of the map `in` that they start from. `rest` is
// as rest_forward left it.
__device__ inline const float* rest_backward(const BankRef& bank, const ModelRecord& model, const float* in,
                                             float* rest, float cotangent) {
  const int begin = model.rest.begin;
  float* grad = rest + model.rest.gradients[0];
  float* other = rest + model.rest.gradients[1];
  read_out_backward(bank, model, model.depth > begin ? rest + model.layers[model.depth - 1].rest : in, cotangent, grad);
  for (int l = model.depth - 1; l >= begin; --l) {
    const float* before = l > begin ? rest + model.layers[l - 1].rest : in;
    separable_backward(bank, model.layers[l], grad, before, rest + model.rest.between, other);
    float* swap = grad;
    grad = other;
    other = swap;
  }
  return grad;
}

}  // namespace cortexloop::cuda
