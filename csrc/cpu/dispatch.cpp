// Which kernels run: the strongest instruction set that was compiled in and that this processor has, or the one asked for.
#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#endif

namespace cortexloop {
namespace cpu {
namespace {

#if defined(CORTEXLOOP_HAVE_AVX2)
#if defined(_MSC_VER) && !defined(__clang__)

bool bit(int value, int position) { return (value >> position & 1) != 0; }

// Windows: processor features by cpuid, and by xgetbv whether the system saves the wide registers.
struct Features {
  bool avx2 = false, avx512 = false, bf16 = false;
  Features() {
    int leaf[4];
    __cpuid(leaf, 0);
    if (leaf[0] < 7) return;
    __cpuid(leaf, 1);
    const bool fma = bit(leaf[2], 12), osxsave = bit(leaf[2], 27);
    if (!osxsave) return;
    const unsigned long long saved = _xgetbv(0);
    __cpuidex(leaf, 7, 0);
    avx2 = fma && bit(leaf[1], 5) && (saved & 6) == 6;
    avx512 =
        avx2 && (saved & 0xe6) == 0xe6 && bit(leaf[1], 16) && bit(leaf[1], 17) && bit(leaf[1], 30) && bit(leaf[1], 31);
    const bool vnni = bit(leaf[2], 11);
    __cpuidex(leaf, 7, 1);
    bf16 = avx512 && vnni && bit(leaf[0], 5);
  }
};

#else

struct Features {
  bool avx2, avx512, bf16;
  Features() {
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    bf16 = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  }
};

#endif
#endif

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> list{kernels_generic()};
#if defined(CORTEXLOOP_HAVE_AVX2)
  const Features features;
  if (features.avx2) list.push_back(kernels_avx2());
#if defined(CORTEXLOOP_HAVE_AVX512)
  if (features.avx512) list.push_back(kernels_avx512());
#if defined(CORTEXLOOP_HAVE_AVX512_BF16)
  if (features.bf16) list.push_back(kernels_avx512_bf16());
#endif
#endif
#endif
#if defined(CORTEXLOOP_HAVE_NEON)
  list.push_back(kernels_neon());
#endif
  return list;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> list = runnable();
  return list;
}

const Kernels* find(const char* name) {
  for (const Kernels* kernels : available()) {
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  }
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{available().back()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* k : available()) names.emplace_back(k->name);
  return names;
}

const char* isa() { return kernels().name; }

bool fast_supported() { return kernels().has_fast; }

Status set_isa(const std::string& name) {
  const Kernels* found = find(name.c_str());
  if (found == nullptr) {
    std::string known;
    for (const Kernels* k : available()) known += (known.empty() ? "" : ", ") + std::string(k->name);
    return fail(Status::invalid_argument, "unknown instruction set '%.40s': this build has on this processor: %s",
                name.c_str(), known.c_str());
  }
  chosen().store(found);
  return Status::ok;
}

}  // namespace cpu
}  // namespace cortexloop
