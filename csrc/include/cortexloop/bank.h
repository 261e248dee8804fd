// The bank operator: many different compact models on a batch of images. Plain structs and functions only.
//
// The packed layout is decided and documented in python/cortexloop/packing.py; the field numbers here mirror it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cortexloop/status.h"

namespace cortexloop {

enum ModelField { kDepth, kHeight, kWidth, kReadout, kReadoutBias, kCost, kModelFields };

enum LayerField {
  kKernelSize,
  kStride,
  kInChannels,
  kOutChannels,
  kOutHeight,
  kOutWidth,
  kPadTop,
  kPadLeft,
  kSpatial,
  kPointwise,
  kBias,
  kTransposed,
  kWinograd,
  kPairs,
  kWinogradTransposed,
  kPixelPairs,
  kLayerFields
};

constexpr int kMaxDepth = 16;        // deeper models go to the reference backend
constexpr int kMaxChannels = 2048;   // likewise wider ones
constexpr int kPaddedChannels = 16;  // packed channel counts are multiples of this

enum class PixelType { u8, f32 };
enum class ImageLayout { nhwc, nchw };
enum class Precision { exact, fast };

struct BankView {
  const float* weights;  // [weights_size]
  std::int64_t weights_size;
  const std::int64_t* table;  // [n_models, table_stride]
  std::int64_t n_models;
  std::int64_t table_stride;
};

struct ImagesView {
  const void* data;  // [batch, height, width, 3] or [batch, 3, height, width]
  PixelType type;    // u8: RGB 0..255, recentred by the kernel; f32: recentred already
  ImageLayout layout;
  std::int64_t batch;
  std::int64_t height;
  std::int64_t width;
};

struct BankForwardArgs {
  BankView bank;
  ImagesView images;
  const std::int64_t*
      pairs;  // [batch]: image i goes through model pairs[i] alone; null: every image through every model
  Precision precision;
  float* responses;  // [batch, n_models], with pairs [batch]
};

struct BankGradientArgs {
  BankView bank;
  ImagesView images;
  const std::int64_t* pairs;  // as above
  const float* cotangent;     // shaped as the responses
  float* grad_images;         // shaped as the images, f32
  float* responses;           // shaped as the responses, or null
};

// The derivative of the last map, for `count` cotangents of each image: what the models' own readouts would be for
// bank_bwd. The forward pass is done once for each image and thread.
struct BankPullbackArgs {
  BankView bank;  // one model; its readout is not used
  ImagesView images;
  const float* cotangents;  // [batch, count, out_h, out_w, out_p] of the last layer, out_p as packed; padding ignored
  std::int64_t count;
  float* grads;  // [batch, count] x images, shaped as one image, f32
};

namespace cpu {

// "" if the kernels take this bank, otherwise one sentence why not. `bank.weights` may be null: only the table is read.
std::string bank_unsupported(const BankView& bank);

Status bank_fwd(const BankForwardArgs& args);
Status bank_bwd(const BankGradientArgs& args);
Status bank_pullback(const BankPullbackArgs& args);

// A forward call resolved once and repeated: `run` reads the images in place and allocates nothing after its first call.
class BankPlan {
 public:
  static Status make(const BankForwardArgs& args, std::unique_ptr<BankPlan>* plan);
  ~BankPlan();
  Status run();

 private:
  struct State;
  explicit BankPlan(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Instruction sets compiled in and runnable on this processor, weakest first; the one in force; choose one by name.
std::vector<std::string> isas();
const char* isa();
Status set_isa(const std::string& name);
bool fast_supported();  // whether the one in force has a reduced-precision forward

}  // namespace cpu

namespace cuda {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  std::int64_t shared_memory;  // of a block at most, bytes
  std::int64_t memory, l2;     // bytes
};

bool emulated();            // built for tests: kernels run on the CPU, device memory is host memory
std::string unavailable();  // "" or one sentence: no driver, no device
int device_count();         // 0 without a driver
Status device(int index, Device* device);
std::string device_unsupported(int index);  // "" or one sentence

// "" if the kernels take this bank, otherwise one sentence why not; "" or one sentence on how its models run. Only the
// table is read: `bank.weights` may be null.
std::string bank_unsupported(const BankView& bank);
std::string bank_note(const BankView& bank);

// Where a call runs. `packed`: a copy of Bank::packed() in the memory of that device, aligned to 256 bytes.
struct Place {
  const void* packed;
  void* workspace;
  std::int64_t workspace_bytes;
  int device;
  void* stream;
};

// A bank as the kernels read it, with all sizes known on the host. Calls launch kernels on a stream and return; they
// allocate nothing, do not wait and can be captured in a graph. All addresses in their arguments are of device memory;
// the BankView in them is ignored.
class Bank {
 public:
  static Status make(const BankView& host, std::unique_ptr<Bank>* bank);
  ~Bank();

  const std::vector<unsigned char>& packed() const;

  // Bytes of workspace that the calls need.
  Status forward_workspace(int device, PixelType type, std::int64_t batch, bool paired, Precision precision,
                           std::int64_t* bytes) const;
  Status gradient_workspace(int device, PixelType type, std::int64_t batch, bool paired, std::int64_t* bytes) const;

  Status forward(const BankForwardArgs& args, const Place& place) const;
  Status gradient(const BankGradientArgs& args, const Place& place) const;

 private:
  struct State;
  explicit Bank(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace cuda
}  // namespace cortexloop
