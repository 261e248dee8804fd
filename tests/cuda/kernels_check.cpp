// Runs the CUDA kernels' source on the CPU without Python, for sanitizers: reads problems with exact answers (problem.h),
// solves each in several ways and compares bits.
//
//   kernels_check FILE...
#include <cstdio>
#include <cstring>

#include "cortexloop/bank.h"
#include "problem.h"

extern "C" int cortexloop_emulation_set(const char* name, long long value);

namespace {

using namespace cortexloop;

// Aligned as device memory is, and exactly as large as asked for.
class DeviceMemory {
 public:
  DeviceMemory(std::int64_t bytes, unsigned char fill) : bytes_(static_cast<std::size_t>(bytes)) {
    data_ = static_cast<unsigned char*>(::operator new(bytes_, std::align_val_t{256}));
    std::memset(data_, fill, bytes_);
  }
  ~DeviceMemory() { ::operator delete(data_, std::align_val_t{256}); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  unsigned char* data() const { return data_; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(bytes_); }

 private:
  std::size_t bytes_;
  unsigned char* data_;
};

void solve(const Problem& p, const std::string& where) {
  std::unique_ptr<cuda::Bank> bank;
  expect_ok(cuda::Bank::make({p.weights.data(), p.weights_size, p.table.data(), p.n_models, p.table_stride}, &bank),
            where);
  const DeviceMemory packed(static_cast<std::int64_t>(bank->packed().size()), 0);
  std::memcpy(packed.data(), bank->packed().data(), bank->packed().size());
  const std::int64_t* pairs = p.with_pairs != 0 ? p.pairs.data() : nullptr;
  const std::vector<float> nchw = to_nchw(p.images, p);
  const std::vector<float> grad_nchw = to_nchw(p.grad_images, p);
  struct Form {
    const char* name;
    const void* data;
    PixelType type;
    ImageLayout layout;
  };
  const Form forms[] = {{"u8 NHWC", p.pixels.data(), PixelType::u8, ImageLayout::nhwc},
                        {"f32 NHWC", p.images.data(), PixelType::f32, ImageLayout::nhwc},
                        {"f32 NCHW", nchw.data(), PixelType::f32, ImageLayout::nchw}};
  for (const Form& form : forms) {
    const ImagesView images{form.data, form.type, form.layout, p.batch, p.height, p.width};
    std::vector<float> responses(p.responses.size(), -1.0f), again(p.responses.size(), -1.0f);
    std::vector<float> grad(p.grad_images.size(), -1.0f);
    for (const Precision precision : {Precision::fast, Precision::exact}) {
      std::int64_t bytes = 0;
      expect_ok(bank->forward_workspace(0, form.type, p.batch, pairs != nullptr, precision, &bytes), where + form.name);
      const DeviceMemory workspace(bytes, 0xff);
      expect_ok(bank->forward({{}, images, pairs, precision, responses.data()},
                              {packed.data(), workspace.data(), workspace.bytes(), 0, nullptr}),
                where + form.name);
    }
    expect_equal(responses, p.responses, where + form.name + " forward");
    std::int64_t bytes = 0;
    expect_ok(bank->gradient_workspace(0, form.type, p.batch, pairs != nullptr, &bytes), where + form.name);
    const DeviceMemory workspace(bytes, 0xff);
    expect_ok(bank->gradient({{}, images, pairs, p.cotangent.data(), grad.data(), again.data()},
                             {packed.data(), workspace.data(), workspace.bytes(), 0, nullptr}),
              where + form.name);
    expect_equal(again, p.responses, where + form.name + " responses beside the gradient");
    expect_equal(grad, form.layout == ImageLayout::nhwc ? p.grad_images : grad_nchw, where + form.name + " gradient");
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (int a = 1; a < argc; ++a) {
      const Problem problem = read_problem(argv[a]);
      for (const int multiprocessors : {2, 64}) {  // few units for many processors: images are cut into bands
        cortexloop_emulation_set("multiprocessors", multiprocessors);
        solve(problem, std::string(argv[a]) + ": ");
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels_check: %s\n", error.what());
    return 1;
  }
  std::puts("kernels_check: all equal");
  return 0;
}
