// Host side of the bank operator: validation, buffers and scheduling. The arithmetic is in kernels/.
//
// A unit of work is one (image, model). Units are numbered image by image, so a thread that takes a range prepares each image
// once; every unit writes its own output, so results depend neither on the number of threads nor on who takes what.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../common/model_view.h"
#include "cortexloop/parallel.h"
#include "dispatch.h"

namespace cortexloop {
namespace cpu {
namespace {

// Models of one gradient partial sum. Part of the definition of the result: the models of a bank are summed in chunks of this
// many, then the chunks in order, whatever the batch and the number of threads.
constexpr std::int64_t kGradientChunk = 16;
// Partial sums held at a time, in bytes; bounds memory whatever the batch.
constexpr std::int64_t kPartialBytes = 64 << 20;

constexpr std::size_t kAlign = 64;

// A 64-byte aligned buffer that only grows; one per thread and purpose, so that repeated calls allocate nothing.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(raw_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Null if there is no memory.
  void* get(std::int64_t bytes) {
    if (bytes > size_) {
      std::free(raw_);
      raw_ = std::malloc(static_cast<std::size_t>(bytes) + kAlign);
      size_ = raw_ == nullptr ? 0 : bytes;
    }
    if (raw_ == nullptr) return nullptr;
    const auto address = reinterpret_cast<std::uintptr_t>(raw_);
    return reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
  }

 private:
  void* raw_ = nullptr;
  std::int64_t size_ = 0;
};

thread_local Buffer image_buffer;
thread_local Buffer scratch_buffer;

// Everything of a call that depends on the bank and on the shapes, not on pixel values.
struct Resolved {
  const Kernels* kernels;
  std::vector<ModelView> models;
  float mean[3];
  ImagesView images;
  std::int64_t stride_n, stride_y, stride_x, stride_c;
  bool rows = false, transformed = false;  // which forms of an image the models read
  std::int64_t image_bytes = 0, scratch_bytes = 0;
};

Status resolve(const BankView& bank, const ImagesView& images, const std::int64_t* pairs, bool gradient, Resolved* r) {
  if (images.batch < 0 || bank.n_models < 1) return fail(Status::invalid_argument, "a negative batch or an empty bank");
  r->kernels = &kernels();
  r->images = images;
  r->models.resize(static_cast<std::size_t>(bank.n_models));
  for (std::int64_t m = 0; m < bank.n_models; ++m) {
    ModelView& model = r->models[static_cast<std::size_t>(m)];
    const std::string reason = resolve_model(bank, m, &model);
    if (!reason.empty()) return fail(Status::invalid_argument, "%s", reason.c_str());
    const LayerView& first = model.layers[0];
    if (first.in_h != images.height || first.in_w != images.width) {
      return fail(Status::invalid_argument, "the bank takes images of %d x %d pixels, got %lld x %lld", first.in_h,
                  first.in_w, static_cast<long long>(images.height), static_cast<long long>(images.width));
    }
    (first.winograd != nullptr ? r->transformed : r->rows) = true;
    r->scratch_bytes = std::max(r->scratch_bytes, r->kernels->scratch_bytes(model, gradient));
  }
  for (std::int64_t i = 0; pairs != nullptr && i < images.batch; ++i) {
    if (pairs[i] < 0 || pairs[i] >= bank.n_models) {
      return fail(Status::invalid_argument, "pairs[%lld] is %lld, but the bank has %lld models",
                  static_cast<long long>(i), static_cast<long long>(pairs[i]), static_cast<long long>(bank.n_models));
    }
  }
  const std::int64_t plane = images.height * images.width;
  r->stride_n = plane * 3;
  const bool nhwc = images.layout == ImageLayout::nhwc;
  r->stride_y = nhwc ? images.width * 3 : images.width;
  r->stride_x = nhwc ? 3 : 1;
  r->stride_c = nhwc ? 1 : plane;
  r->image_bytes = r->kernels->prepared_bytes(static_cast<std::int32_t>(images.height),
                                              static_cast<std::int32_t>(images.width), r->rows, r->transformed);
  for (int c = 0; c < 3; ++c) r->mean[c] = bank.weights[c];
  return Status::ok;
}

PreparedImage prepare(const Resolved& r, std::int64_t image, void* memory) {
  ImageSource source;
  source.is_u8 = r.images.type == PixelType::u8;
  const std::int64_t bytes = r.stride_n * (source.is_u8 ? 1 : static_cast<std::int64_t>(sizeof(float)));
  source.data = static_cast<const char*>(r.images.data) + image * bytes;
  source.stride_y = r.stride_y;
  source.stride_x = r.stride_x;
  source.stride_c = r.stride_c;
  source.height = static_cast<std::int32_t>(r.images.height);
  source.width = static_cast<std::int32_t>(r.images.width);
  for (int c = 0; c < 3; ++c) source.mean[c] = r.mean[c];
  PreparedImage prepared;
  r.kernels->prepare(source, r.rows, r.transformed, memory, &prepared);
  return prepared;
}

struct Memory {
  void* image;
  void* scratch;
};

bool thread_memory(const Resolved& r, std::atomic<bool>& failed, Memory* memory) {
  memory->image = image_buffer.get(r.image_bytes);
  memory->scratch = scratch_buffer.get(r.scratch_bytes);
  if (memory->image != nullptr && memory->scratch != nullptr) return true;
  failed.store(true);
  return false;
}

Status out_of_memory(const Resolved& r) {
  return fail(Status::out_of_memory, "no memory for %lld bytes of scratch per thread",
              static_cast<long long>(r.image_bytes + r.scratch_bytes));
}

std::int64_t chunk_of(std::int64_t units, std::int64_t units_per_image) {
  const std::int64_t per_thread = units / (8 * std::int64_t{num_threads()});
  return std::max<std::int64_t>(1, std::min(per_thread, units_per_image));
}

struct ForwardJob {
  const Resolved* resolved;
  const std::int64_t* pairs;
  bool fast;
  float* responses;
  std::atomic<bool> failed{false};
};

void forward_body(void* argument, RangeSource& ranges) {
  ForwardJob& job = *static_cast<ForwardJob*>(argument);
  const Resolved& r = *job.resolved;
  Memory memory;
  if (!thread_memory(r, job.failed, &memory)) return;
  const auto n_models = static_cast<std::int64_t>(r.models.size());
  const std::int64_t per_image = job.pairs != nullptr ? 1 : n_models;
  std::int64_t current = -1;
  PreparedImage prepared{};
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t image = unit / per_image;
      const std::int64_t model = job.pairs != nullptr ? job.pairs[image] : unit % per_image;
      if (image != current) {
        prepared = prepare(r, image, memory.image);
        current = image;
      }
      job.responses[unit] =
          r.kernels->forward(r.models[static_cast<std::size_t>(model)], prepared, job.fast, memory.scratch);
    }
  }
}

Status run_forward(const Resolved& r, const std::int64_t* pairs, Precision precision, float* responses) {
  ForwardJob job;
  job.resolved = &r;
  job.pairs = pairs;
  job.fast = precision == Precision::fast && r.kernels->has_fast;
  job.responses = responses;
  const std::int64_t per_image = pairs != nullptr ? 1 : static_cast<std::int64_t>(r.models.size());
  const std::int64_t units = r.images.batch * per_image;
  parallel_run(units, chunk_of(units, per_image), forward_body, &job);
  return job.failed ? out_of_memory(r) : Status::ok;
}

struct GradientJob {
  const Resolved* resolved;
  const std::int64_t* pairs;
  const float* cotangent;
  float* responses;  // null: not wanted
  float* grad_images;
  float* partials;  // [images of the group, chunks, height * width * 3]; null: one chunk, straight to the output
  std::int64_t first_image, chunks;
  std::atomic<bool> failed{false};
};

void write_gradient(const Resolved& r, const float* grad, float* out) {
  const std::int64_t pixels = r.images.height * r.images.width;
  if (r.images.layout == ImageLayout::nhwc) {
    std::memcpy(out, grad, static_cast<std::size_t>(pixels) * 3 * sizeof(float));
    return;
  }
  for (std::int64_t i = 0; i < pixels; ++i) {
    for (int c = 0; c < 3; ++c) out[c * pixels + i] = grad[i * 3 + c];
  }
}

thread_local Buffer gradient_buffer;

// One unit: one image and one chunk of models (with pairs, the image's own model).
void gradient_body(void* argument, RangeSource& ranges) {
  GradientJob& job = *static_cast<GradientJob*>(argument);
  const Resolved& r = *job.resolved;
  Memory memory;
  if (!thread_memory(r, job.failed, &memory)) return;
  const auto n_models = static_cast<std::int64_t>(r.models.size());
  const std::int64_t floats = r.stride_n;
  auto* local = static_cast<float*>(gradient_buffer.get(floats * static_cast<std::int64_t>(sizeof(float))));
  if (local == nullptr) {
    job.failed.store(true);
    return;
  }
  std::int64_t current = -1;
  PreparedImage prepared{};
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t in_group = unit / job.chunks, chunk = unit % job.chunks;
      const std::int64_t image = job.first_image + in_group;
      if (image != current) {
        prepared = prepare(r, image, memory.image);
        current = image;
      }
      float* grad = job.partials != nullptr ? job.partials + unit * floats : local;
      const std::int64_t first = job.pairs != nullptr ? job.pairs[image] : chunk * kGradientChunk;
      const std::int64_t last = job.pairs != nullptr ? first + 1 : std::min(n_models, first + kGradientChunk);
      bool overwrite = true;
      for (std::int64_t m = first; m < last; ++m) {
        const ModelView& model = r.models[static_cast<std::size_t>(m)];
        const std::int64_t at = job.pairs != nullptr ? image : image * n_models + m;
        float response = 0.0f;
        if (job.cotangent[at] != 0.0f) {  // also true for NaN, which must show
          response = r.kernels->gradient(model, prepared, job.cotangent[at], overwrite, false, grad, memory.scratch);
          overwrite = false;
        } else if (job.responses != nullptr) {
          response = r.kernels->forward(model, prepared, false, memory.scratch);
        }
        if (job.responses != nullptr) job.responses[at] = response;
      }
      if (overwrite) std::memset(grad, 0, static_cast<std::size_t>(floats) * sizeof(float));
      if (job.partials == nullptr) write_gradient(r, grad, job.grad_images + image * floats);
    }
  }
}

// Sum the chunks of each image in order.
void sum_body(void* argument, RangeSource& ranges) {
  GradientJob& job = *static_cast<GradientJob*>(argument);
  const std::int64_t floats = job.resolved->stride_n;
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t image = begin; image < end; ++image) {
      float* sum = job.partials + image * job.chunks * floats;
      for (std::int64_t chunk = 1; chunk < job.chunks; ++chunk) {
        const float* partial = sum + chunk * floats;
        for (std::int64_t i = 0; i < floats; ++i) sum[i] += partial[i];
      }
      write_gradient(*job.resolved, sum, job.grad_images + (job.first_image + image) * floats);
    }
  }
}

struct PullbackJob {
  const Resolved* resolved;
  const float* cotangents;
  std::int64_t count, cotangent_floats;
  float* grads;
  std::atomic<bool> failed{false};
};

// One unit: one cotangent of one image.
void pullback_body(void* argument, RangeSource& ranges) {
  PullbackJob& job = *static_cast<PullbackJob*>(argument);
  const Resolved& r = *job.resolved;
  Memory memory;
  if (!thread_memory(r, job.failed, &memory)) return;
  const std::int64_t floats = r.stride_n;
  const bool direct = r.images.layout == ImageLayout::nhwc;
  float* local = nullptr;
  if (!direct) {
    local = static_cast<float*>(gradient_buffer.get(floats * static_cast<std::int64_t>(sizeof(float))));
    if (local == nullptr) {
      job.failed.store(true);
      return;
    }
  }
  ModelView model = r.models[0];
  std::int64_t current = -1;
  PreparedImage prepared{};
  std::int64_t begin, end;
  while (ranges.take(begin, end)) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t image = unit / job.count;
      const bool repeat = image == current;
      if (!repeat) {
        prepared = prepare(r, image, memory.image);
        current = image;
      }
      model.readout = job.cotangents + unit * job.cotangent_floats;
      float* out = job.grads + unit * floats;
      r.kernels->gradient(model, prepared, 1.0f, true, repeat, direct ? out : local, memory.scratch);
      if (!direct) write_gradient(r, local, out);
    }
  }
}

}  // namespace

std::string bank_unsupported(const BankView& bank) {
  if (bank.n_models < 1) return "the bank is empty";
  ModelView view;
  for (std::int64_t m = 0; m < bank.n_models; ++m) {
    std::string reason = resolve_model(bank, m, &view);
    if (!reason.empty()) return reason;
  }
  return "";
}

Status bank_fwd(const BankForwardArgs& args) {
  Resolved resolved;
  const Status status = resolve(args.bank, args.images, args.pairs, false, &resolved);
  if (status != Status::ok) return status;
  return run_forward(resolved, args.pairs, args.precision, args.responses);
}

Status bank_bwd(const BankGradientArgs& args) {
  Resolved resolved;
  const Status status = resolve(args.bank, args.images, args.pairs, true, &resolved);
  if (status != Status::ok) return status;
  GradientJob job;
  job.resolved = &resolved;
  job.pairs = args.pairs;
  job.cotangent = args.cotangent;
  job.responses = args.responses;
  job.grad_images = args.grad_images;
  job.chunks = args.pairs != nullptr ? 1 : (args.bank.n_models + kGradientChunk - 1) / kGradientChunk;
  const std::int64_t batch = args.images.batch;
  const std::int64_t image_bytes = job.chunks * resolved.stride_n * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t group = job.chunks == 1 ? batch : std::max<std::int64_t>(1, kPartialBytes / image_bytes);
  Buffer partials;
  job.partials = nullptr;
  if (job.chunks > 1) {
    job.partials = static_cast<float*>(partials.get(std::min(group, batch) * image_bytes));
    if (job.partials == nullptr) {
      return fail(Status::out_of_memory, "no memory for %lld bytes of partial gradients",
                  static_cast<long long>(std::min(group, batch) * image_bytes));
    }
  }
  for (job.first_image = 0; job.first_image < batch; job.first_image += group) {
    const std::int64_t images = std::min(group, batch - job.first_image);
    parallel_run(images * job.chunks, 1, gradient_body, &job);
    if (job.failed) return out_of_memory(resolved);
    if (job.chunks > 1) parallel_run(images, 1, sum_body, &job);
  }
  return Status::ok;
}

Status bank_pullback(const BankPullbackArgs& args) {
  Resolved resolved;
  const Status status = resolve(args.bank, args.images, nullptr, true, &resolved);
  if (status != Status::ok) return status;
  if (args.bank.n_models != 1 || args.count < 0) {
    return fail(Status::invalid_argument, "one model and a count of cotangents, not negative, are needed");
  }
  const ModelView& model = resolved.models[0];
  const LayerView& last = model.layers[model.depth - 1];
  PullbackJob job;
  job.resolved = &resolved;
  job.cotangents = args.cotangents;
  job.count = args.count;
  job.cotangent_floats = std::int64_t{last.out_h} * last.out_w * last.out_p;
  job.grads = args.grads;
  const std::int64_t units = args.images.batch * args.count;
  parallel_run(units, chunk_of(units, args.count), pullback_body, &job);
  return job.failed ? out_of_memory(resolved) : Status::ok;
}

struct BankPlan::State {
  BankForwardArgs args;
  Resolved resolved;
};

BankPlan::BankPlan(std::unique_ptr<State> state) : state_(std::move(state)) {}
BankPlan::~BankPlan() = default;

Status BankPlan::make(const BankForwardArgs& args, std::unique_ptr<BankPlan>* plan) {
  auto state = std::make_unique<State>();
  state->args = args;
  const Status status = resolve(args.bank, args.images, args.pairs, false, &state->resolved);
  if (status == Status::ok) plan->reset(new BankPlan(std::move(state)));
  return status;
}

Status BankPlan::run() {
  return run_forward(state_->resolved, state_->args.pairs, state_->args.precision, state_->args.responses);
}

}  // namespace cpu
}  // namespace cortexloop
