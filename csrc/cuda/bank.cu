// Host side of the bank on a GPU: devices, sizes, and the launches that make up a call. The arithmetic is in bank_fwd.cu
// and bank_bwd.cu.
//
// Workspace of a call: counters that blocks draw units from, one area for each block that runs at a time, prepared images,
// and for a gradient without pairs the gradients of single models. Kernels of one call run one after the other and share it.
#include "cortexloop/bank.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "launch.h"
#include "packed.h"
#include "tasks.h"

namespace cortexloop::cuda {
namespace {

constexpr int kOldestMajor = 8;
constexpr std::int64_t kReserved = 1024;          // of a block's shared memory: CUDA's own and static variables
constexpr std::int64_t kCounters = 256;           // bytes: heads draw from the first number, the others from the 32nd
constexpr std::int64_t kMostAreas = 256ll << 20;  // bytes; models one layer at a time may need megabytes each
constexpr std::int64_t kMostGradients = 256ll << 20;  // bytes of gradients of single models held at a time
constexpr std::int64_t kMostImages = 256ll << 20;     // bytes of prepared images held at a time
constexpr std::int64_t kMostUnits = 1ll << 30;        // of one launch
constexpr int kMostBands = 7;

struct Limits {
  int multiprocessors = 0, shared_block = 0, shared_multiprocessor = 0;
};

Status attribute(cudaDeviceAttr which, int device, int* value) {
  return check(cudaDeviceGetAttribute(value, which, device), "cudaDeviceGetAttribute");
}

Status read_limits(int device, Limits* limits) {
  Status status = attribute(cudaDevAttrMultiProcessorCount, device, &limits->multiprocessors);
  if (status == Status::ok) {
    status = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, &limits->shared_block);
  }
  if (status == Status::ok) {
    status = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, &limits->shared_multiprocessor);
  }
  return status;
}

// How one kernel runs a number of units.
struct Plan {
  Variant variant = Variant::plain;
  int shared = 0, bands = 1, grid = 0;
  std::int64_t arrivals = 0;  // bytes
  std::int64_t area = 0, areas = 0;
};

// A call: rounds of images, and in each round the models with a head, then the others.
struct Call {
  Plan heads, plains;
  std::int64_t images = 0;                       // of a round
  std::int64_t prepared = 0;                     // start of prepared images; 0: no model has a head
  int planes = 1;                                // of a prepared image
  std::int64_t head_parts = 0, plain_parts = 0;  // starts of gradients of single models; 0: written to the images
  std::int64_t bytes = 0;
};

ImagesRef images_ref(const ImagesView& images) {
  const std::int64_t plane = images.height * images.width;
  const bool nhwc = images.layout == ImageLayout::nhwc;
  return {images.data,
          images.type == PixelType::u8 ? 1 : 0,
          static_cast<std::int32_t>(images.height),
          static_cast<std::int32_t>(images.width),
          3 * plane,
          nhwc ? 3 * images.width : images.width,
          nhwc ? 3 : 1,
          nhwc ? 1 : plane};
}

// Blocks for a kernel that walks over so many numbers in steps of its grid.
int grid_of(std::int64_t numbers) {
  return static_cast<int>(std::min<std::int64_t>((numbers + kPlainThreads - 1) / kPlainThreads, 1 << 14));
}

}  // namespace

bool emulated() {
#if defined(CORTEXLOOP_EMULATION)
  return true;
#else
  return false;
#endif
}

std::string unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is missing or older than the CUDA version cortexloop was built with; update the driver";
  }
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "this machine has no NVIDIA GPU that CUDA can see";
  return std::string("CUDA cannot be used: ") + cudaGetErrorString(error);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

Status device(int index, Device* found) {
  cudaDeviceProp properties;
  const Status status = check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  if (status != Status::ok) return status;
  found->name = properties.name;
  found->major = properties.major;
  found->minor = properties.minor;
  found->multiprocessors = properties.multiProcessorCount;
  found->shared_memory = static_cast<std::int64_t>(properties.sharedMemPerBlockOptin);
  found->memory = static_cast<std::int64_t>(properties.totalGlobalMem);
  found->l2 = properties.l2CacheSize;
  return Status::ok;
}

std::string device_unsupported(int index) {
  int major = 0, minor = 0;
  if (attribute(cudaDevAttrComputeCapabilityMajor, index, &major) != Status::ok ||
      attribute(cudaDevAttrComputeCapabilityMinor, index, &minor) != Status::ok) {
    return last_error();
  }
  if (major >= kOldestMajor) return "";
  return "the CUDA kernels need compute capability 8.0 or higher, device " + std::to_string(index) + " has " +
         std::to_string(major) + "." + std::to_string(minor);
}

std::string bank_unsupported(const BankView& bank) {
  int heads = 0;
  return describe_bank(bank, &heads);
}

std::string bank_note(const BankView& bank) {
  int heads = 0;
  describe_bank(bank, &heads);
  if (heads == bank.n_models) return "";
  return std::to_string(bank.n_models - heads) + " of " + std::to_string(bank.n_models) +
         " models are not of the published form and run one layer at a time, exactly and slowly";
}

struct Bank::State {
  PackedBank packed;
  std::mutex mutex;
  std::map<int, Limits> limits;
  std::map<std::pair<int, std::pair<int, int>>, int> resident;  // by device, kernel and shared memory

  Status limits_of(int device, Limits* found) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = limits.find(device);
    if (known == limits.end()) {
      const Status status = read_limits(device, found);
      if (status == Status::ok) limits[device] = *found;
      return status;
    }
    *found = known->second;
    return Status::ok;
  }

  // Blocks that run at a time on the whole device.
  Status slots(int device, Variant variant, bool gradient, int shared, int* slots_found) {
    Limits found;
    Status status = limits_of(device, &found);
    if (status != Status::ok) return status;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_pair(device, std::make_pair(static_cast<int>(variant) + (gradient ? 16 : 0), shared));
    const auto known = resident.find(key);
    int blocks = 0;
    if (known == resident.end()) {
      const DeviceGuard guard(device);
      if (guard.status() != Status::ok) return guard.status();
      status = gradient ? gradient_blocks(variant, shared, &blocks) : forward_blocks(variant, shared, &blocks);
      if (status != Status::ok) return status;
      if (blocks < 1) {
        return fail(Status::device_error,
                    "device %d has no room for one block of the kernel (%d bytes of shared memory)", device, shared);
      }
      resident[key] = blocks;
    } else {
      blocks = known->second;
    }
    *slots_found = blocks * found.multiprocessors;
    return Status::ok;
  }

  template <class Numbers>
  Status plan_heads(int device, std::int64_t units, Plan* plan) {
    plan->variant = Numbers::kExact ? Variant::exact : Variant::fast;
    Limits found;
    Status status = limits_of(device, &found);
    if (status != Status::ok) return status;
    constexpr int head = HeadShape<Numbers>::kBytes;
    std::int64_t map = 0, rest = 0;
    for (const std::int32_t m : packed.heads) {
      const ModelRecord& model = packed.models[static_cast<std::size_t>(m)];
      const std::int64_t map_bytes = aligned(4 * out_floats(model.layers[kAfterHead - 1]));
      map = std::max(map, map_bytes);
      rest = std::max(rest, aligned(4 * model.rest.floats));
    }
    // Room for the third map, as long as it costs no resident block.
    const int most = found.shared_block - static_cast<int>(kReserved);
    const int target = std::min(most, found.shared_multiprocessor / Numbers::kBlocks - static_cast<int>(kReserved));
    plan->shared = std::max(head, static_cast<int>(std::min<std::int64_t>(head + map, target)));
    int slots_found = 0;
    status = slots(device, plan->variant, false, plan->shared, &slots_found);
    if (status != Status::ok) return status;
    const int rows = packed.models[static_cast<std::size_t>(packed.heads[0])].height / 4;
    plan->bands = static_cast<int>(
        std::max<std::int64_t>(1, std::min<std::int64_t>({slots_found / units, kMostBands, std::max(1, rows / 4)})));
    plan->grid = static_cast<int>(std::min<std::int64_t>(slots_found, units * plan->bands));
    plan->area = plan->bands > 1 ? 2 * map + rest : map + rest;
    plan->areas = plan->bands > 1 ? units : plan->grid;
    plan->arrivals = plan->bands > 1 ? aligned(4 * units) : 0;
    return Status::ok;
  }

  Status plan_plains(int device, bool gradient, std::int64_t units, Plan* plan) {
    plan->variant = Variant::plain;
    for (const std::int32_t m : packed.plains) {
      const ModelRecord& model = packed.models[static_cast<std::size_t>(m)];
      const std::int64_t floats =
          out_floats(model.layers[0]) + (gradient ? model.rest.gradient_floats : model.rest.floats);
      plan->area = std::max(plan->area, aligned(4 * floats));
    }
    int slots_found = 0;
    const Status status = slots(device, plan->variant, gradient, 0, &slots_found);
    if (status != Status::ok) return status;
    const std::int64_t areas = std::max<std::int64_t>(1, kMostAreas / std::max<std::int64_t>(1, plan->area));
    plan->grid = static_cast<int>(std::min({static_cast<std::int64_t>(slots_found), units, areas}));
    plan->areas = plan->grid;
    return Status::ok;
  }

  Status plan_gradient_heads(int device, std::int64_t units, bool* rings_shared, Plan* plan) {
    plan->variant = Variant::exact;
    Limits found;
    Status status = limits_of(device, &found);
    if (status != Status::ok) return status;
    for (const std::int32_t m : packed.heads) {
      plan->area = std::max(plan->area, gradient_area(packed.models[static_cast<std::size_t>(m)]).bytes);
    }
    const int without = std::max(HeadShape<Exact>::kBytes, BackShape::kBytes);
    const int with = std::max(without, BackShape::kBytes + BackShape::kRingBytes);
    *rings_shared = with <= found.shared_block - kReserved;
    plan->shared = *rings_shared ? with : without;
    int slots_found = 0;
    status = slots(device, plan->variant, true, plan->shared, &slots_found);
    if (status != Status::ok) return status;
    plan->grid = static_cast<int>(std::min<std::int64_t>(slots_found, units));
    plan->areas = plan->grid;
    return Status::ok;
  }

  std::int64_t units(const std::vector<std::int32_t>& models, std::int64_t images, bool paired) const {
    return paired ? images : images * static_cast<std::int64_t>(models.size());
  }

  static std::int64_t bytes_of(const Plan& plan) { return plan.arrivals + plan.area * plan.areas; }

  std::int64_t prepared_size(int planes) const { return prepared_bytes(packed.models[0].height, planes); }

  std::int64_t images_prepared(int planes) const {
    return packed.heads.empty() ? kMostUnits : std::max<std::int64_t>(1, kMostImages / prepared_size(planes));
  }

  // Counters and areas, then the prepared images of a round.
  void add_prepared(Call* call) const {
    call->bytes = aligned(kCounters + std::max(bytes_of(call->heads), bytes_of(call->plains)));
    if (packed.heads.empty()) return;
    call->prepared = call->bytes;
    call->bytes += call->images * prepared_size(call->planes);
  }

  Status plan_forward(int device, PixelType type, std::int64_t batch, bool paired, Precision precision, Call* call) {
    call->planes = type == PixelType::f32 && precision == Precision::exact ? 2 : 1;
    const auto most = std::max<std::size_t>({1, packed.heads.size(), packed.plains.size()});
    call->images = std::min(
        {batch, images_prepared(call->planes), paired ? kMostUnits : kMostUnits / static_cast<std::int64_t>(most)});
    if (!packed.heads.empty()) {
      const std::int64_t n = units(packed.heads, call->images, paired);
      const Status status = precision == Precision::exact ? plan_heads<Exact>(device, n, &call->heads)
                                                          : plan_heads<Fast>(device, n, &call->heads);
      if (status != Status::ok) return status;
    }
    if (!packed.plains.empty()) {
      const Status status = plan_plains(device, false, units(packed.plains, call->images, paired), &call->plains);
      if (status != Status::ok) return status;
    }
    add_prepared(call);
    return Status::ok;
  }

  // Gradients of one model per image go straight to the images.
  bool to_images(bool paired) const { return paired || packed.models.size() == 1; }

  Status plan_gradient(int device, PixelType type, std::int64_t batch, bool paired, bool* rings_shared, Call* call) {
    call->planes = type == PixelType::f32 ? 2 : 1;
    const ModelRecord& first = packed.models[0];
    const std::int64_t gradient = 4ll * first.height * first.width * 3;
    const auto n_models = static_cast<std::int64_t>(packed.models.size());
    call->images = std::min({batch, images_prepared(call->planes), kMostUnits / n_models});
    if (!to_images(paired)) {
      call->images = std::min(call->images, std::max<std::int64_t>(1, kMostGradients / (gradient * n_models)));
    }
    if (!packed.heads.empty()) {
      const Status status =
          plan_gradient_heads(device, units(packed.heads, call->images, paired), rings_shared, &call->heads);
      if (status != Status::ok) return status;
    }
    if (!packed.plains.empty()) {
      const Status status = plan_plains(device, true, units(packed.plains, call->images, paired), &call->plains);
      if (status != Status::ok) return status;
    }
    add_prepared(call);
    if (!to_images(paired)) {
      call->head_parts = aligned(call->bytes);
      call->plain_parts =
          call->head_parts + aligned(call->images * static_cast<std::int64_t>(packed.heads.size()) * gradient);
      call->bytes = call->plain_parts + call->images * static_cast<std::int64_t>(packed.plains.size()) * gradient;
    }
    return Status::ok;
  }

  Status check_images(const ImagesView& images, const Place& place, std::int64_t bytes) const {
    const ModelRecord& first = packed.models[0];
    if (images.batch < 0) return fail(Status::invalid_argument, "a negative batch");
    if (images.height != first.height || images.width != first.width) {
      return fail(Status::invalid_argument, "the bank takes images of %d x %d pixels, got %lld x %lld", first.height,
                  first.width, static_cast<long long>(images.height), static_cast<long long>(images.width));
    }
    if (place.workspace_bytes < bytes) {
      return fail(Status::invalid_argument, "the call needs %lld bytes of workspace, got %lld",
                  static_cast<long long>(bytes), static_cast<long long>(place.workspace_bytes));
    }
    return Status::ok;
  }

  // Everything of a kernel's task that does not depend on which kernel it is.
  UnitsRef units_ref(const ImagesView& images, const std::int64_t* pairs, const Place& place, const Call& call,
                     bool heads, std::int64_t first_image, std::int64_t count) const {
    const Plan& plan = heads ? call.heads : call.plains;
    const PackedHeader& header = packed.header();
    const auto* bytes = static_cast<const unsigned char*>(place.packed);
    auto* workspace = static_cast<unsigned char*>(place.workspace);
    const std::vector<std::int32_t>& models = heads ? packed.heads : packed.plains;
    UnitsRef u;
    u.bank = {bytes};
    u.images = images_ref(images);
    u.pairs = pairs;
    u.order = reinterpret_cast<const std::int32_t*>(bytes + (heads ? header.head_order : header.plain_order));
    u.count = static_cast<std::int32_t>(models.size());
    u.n_models = header.n_models;
    u.first_image = first_image;
    u.units = static_cast<std::uint32_t>(units(models, count, pairs != nullptr));
    u.next = reinterpret_cast<std::uint32_t*>(workspace + (heads ? 0 : kCounters / 2));
    u.areas = workspace + kCounters + plan.arrivals;
    u.area_bytes = plan.area;
    u.shared_bytes = plan.shared;
    u.prepared = workspace + call.prepared;
    u.planes = call.planes;
    return u;
  }

  // Before the first kernel of a round: counters at zero, images prepared.
  Status begin_round(const ImagesView& images, const Place& place, const Call& call, std::int64_t first_image,
                     std::int64_t count) const {
    const auto stream = static_cast<cudaStream_t>(place.stream);
    auto* workspace = static_cast<unsigned char*>(place.workspace);
    const std::int64_t zeros = kCounters + std::max(call.heads.arrivals, call.plains.arrivals);
    const Status status =
        check(cudaMemsetAsync(workspace, 0, static_cast<std::size_t>(zeros), stream), "cudaMemsetAsync");
    if (status != Status::ok || packed.heads.empty()) return status;
    ImagesTask task;
    task.images = images_ref(images);
    task.bank = {static_cast<const unsigned char*>(place.packed)};
    task.first_image = first_image;
    task.batch = count;
    task.planes = call.planes;
    task.prepared = reinterpret_cast<std::uint32_t*>(workspace + call.prepared);
    return launch_images(task, grid_of(count * (images.height + 4) * (kPreparedRow / 2)), stream);
  }
};

Bank::Bank(std::unique_ptr<State> state) : state_(std::move(state)) {}
Bank::~Bank() = default;

Status Bank::make(const BankView& host, std::unique_ptr<Bank>* bank) {
  auto state = std::make_unique<State>();
  const Status status = pack_bank(host, &state->packed);
  if (status == Status::ok) bank->reset(new Bank(std::move(state)));
  return status;
}

const std::vector<unsigned char>& Bank::packed() const { return state_->packed.bytes; }

Status Bank::forward_workspace(int device, PixelType type, std::int64_t batch, bool paired, Precision precision,
                               std::int64_t* bytes) const {
  *bytes = 0;
  if (batch <= 0) return Status::ok;
  Call call;
  const Status status = state_->plan_forward(device, type, batch, paired, precision, &call);
  *bytes = call.bytes;
  return status;
}

Status Bank::gradient_workspace(int device, PixelType type, std::int64_t batch, bool paired,
                                std::int64_t* bytes) const {
  *bytes = 0;
  if (batch <= 0) return Status::ok;
  Call call;
  bool rings_shared = false;
  const Status status = state_->plan_gradient(device, type, batch, paired, &rings_shared, &call);
  *bytes = call.bytes;
  return status;
}

Status Bank::forward(const BankForwardArgs& args, const Place& place) const {
  const std::int64_t batch = args.images.batch;
  const bool paired = args.pairs != nullptr;
  Call call;
  Status status = Status::ok;
  if (batch > 0) status = state_->plan_forward(place.device, args.images.type, batch, paired, args.precision, &call);
  if (status == Status::ok) status = state_->check_images(args.images, place, call.bytes);
  if (status != Status::ok || batch == 0) return status;
  const DeviceGuard guard(place.device);
  if (guard.status() != Status::ok) return guard.status();
  const auto stream = static_cast<cudaStream_t>(place.stream);
  for (std::int64_t first = 0; first < batch; first += call.images) {
    const std::int64_t count = std::min(call.images, batch - first);
    status = state_->begin_round(args.images, place, call, first, count);
    if (status != Status::ok) return status;
    for (const bool heads : {true, false}) {
      const Plan& plan = heads ? call.heads : call.plains;
      if (plan.grid == 0) continue;
      ForwardTask task;
      task.units = state_->units_ref(args.images, args.pairs, place, call, heads, first, count);
      task.responses = args.responses;
      task.bands = plan.bands;
      task.arrivals = reinterpret_cast<std::uint32_t*>(static_cast<unsigned char*>(place.workspace) + kCounters);
      status = launch_forward(plan.variant, task, plan.grid, stream);
      if (status != Status::ok) return status;
    }
  }
  return Status::ok;
}

Status Bank::gradient(const BankGradientArgs& args, const Place& place) const {
  const std::int64_t batch = args.images.batch;
  const bool paired = args.pairs != nullptr;
  Call call;
  bool rings_shared = false;
  Status status = Status::ok;
  if (batch > 0) status = state_->plan_gradient(place.device, args.images.type, batch, paired, &rings_shared, &call);
  if (status == Status::ok) status = state_->check_images(args.images, place, call.bytes);
  if (status != Status::ok || batch == 0) return status;
  const DeviceGuard guard(place.device);
  if (guard.status() != Status::ok) return guard.status();
  const auto stream = static_cast<cudaStream_t>(place.stream);
  auto* workspace = static_cast<unsigned char*>(place.workspace);
  const PackedBank& packed = state_->packed;
  for (std::int64_t first = 0; first < batch; first += call.images) {
    const std::int64_t count = std::min(call.images, batch - first);
    GradientTask task;
    status = state_->begin_round(args.images, place, call, first, count);
    if (status != Status::ok) return status;
    for (const bool heads : {true, false}) {
      const Plan& plan = heads ? call.heads : call.plains;
      if (plan.grid == 0) continue;
      task.units = state_->units_ref(args.images, args.pairs, place, call, heads, first, count);
      task.cotangent = args.cotangent;
      task.responses = args.responses;
      task.to_images = state_->to_images(paired) ? 1 : 0;
      task.grad = task.to_images != 0
                      ? args.grad_images
                      : reinterpret_cast<float*>(workspace + (heads ? call.head_parts : call.plain_parts));
      task.rings_shared = rings_shared ? 1 : 0;
      status =
          check(cudaMemsetAsync(place.workspace, 0, static_cast<std::size_t>(kCounters), stream), "cudaMemsetAsync");
      if (status == Status::ok) status = launch_gradient(plan.variant, task, plan.grid, stream);
      if (status != Status::ok) return status;
    }
    if (state_->to_images(paired)) continue;
    SumTask sum;
    sum.head_parts = reinterpret_cast<const float*>(workspace + call.head_parts);
    sum.plain_parts = reinterpret_cast<const float*>(workspace + call.plain_parts);
    sum.slot =
        reinterpret_cast<const std::int32_t*>(static_cast<const unsigned char*>(place.packed) + packed.header().slots);
    sum.cotangent = args.cotangent;
    sum.grad = args.grad_images;
    sum.images = task.units.images;
    sum.batch = count;
    sum.first_image = first;
    sum.n_models = packed.header().n_models;
    sum.heads = static_cast<std::int32_t>(packed.heads.size());
    sum.plains = static_cast<std::int32_t>(packed.plains.size());
    status = launch_sum(sum, grid_of(count * args.images.height * args.images.width * 3), stream);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace cortexloop::cuda
