#include "races.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include <dlfcn.h>
#include <link.h>

#include "block.h"
#include "state.h"

namespace cortexloop::emulation::races {
namespace {

bool enabled = false;  // set by code that was compiled with checks

struct Access {
  std::uint32_t block = 0;  // 0: none yet
  std::uint32_t epoch = 0;  // barriers of the block before
  std::uint32_t warp_epoch = 0;
  int thread = 0;
  std::uint64_t time = 0;
  const void* from = nullptr;
};

// Of one byte. The two loads are by different threads, of different warps if there were such.
struct Byte {
  Access store;
  Access loads[2];
  Access constant;  // the last __ldg
  Access copy;      // the asynchronous copy that is under way, if its block is the one that runs
};

struct Moment {
  std::uint64_t time;
  std::uint32_t epoch;
};

struct Atomic {
  const void* address;
  int thread;
  std::uint64_t time;
  std::uint32_t epoch;
};

// What a block has done that orders its accesses against those of other blocks.
struct History {
  std::vector<std::vector<Moment>> fences = std::vector<std::vector<Moment>>(1024);  // by thread, in order of time
  std::vector<Atomic> atomics;                                                       // likewise
};

constexpr std::size_t kChunk = 64;
using Chunk = std::array<Byte, kChunk>;

// Blocks of one launch are numbered as they begin, from 1.
struct BlockClock {
  std::uint32_t number = 0;
  std::uint32_t epoch = 0;
  std::vector<std::uint32_t> warp_epochs;
  std::uintptr_t statics_begin = 0, statics_end = 0;  // __shared__ variables, which are thread_local here
};

thread_local BlockClock clock_of_block;
// Only the block that runs touches these (launch.cpp).
std::unordered_map<std::uintptr_t, Chunk> memory;
std::map<std::uint32_t, History> histories;
std::uint64_t now = 0;
std::uint32_t n_blocks = 0;

struct Statics {
  std::uintptr_t code, begin, end;
};

// The thread_local variables, of this thread, of the library that this code is in.
Statics find_statics() {
  Statics found{reinterpret_cast<std::uintptr_t>(&find_statics), 0, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        auto& statics = *static_cast<Statics*>(data);
        bool here = false;
        std::size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const std::uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
          if (segment.p_type == PT_LOAD && statics.code >= begin && statics.code < begin + segment.p_memsz) here = true;
          if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
        }
        if (!here || info->dlpi_tls_data == nullptr) return 0;
        statics.begin = reinterpret_cast<std::uintptr_t>(info->dlpi_tls_data);
        statics.end = statics.begin + bytes;
        return 1;
      },
      &found);
  return found;
}

bool private_to_block(const void* address) {
  const auto byte = reinterpret_cast<std::uintptr_t>(address);
  return Block::active().in_shared(address, 1) ||
         (byte >= clock_of_block.statics_begin && byte < clock_of_block.statics_end);
}

// Whether `thread` of a block fenced between two times, between its barriers number `from` and `to`.
bool fenced(const History& history, int thread, std::uint64_t after, std::uint64_t before, std::uint32_t from = 0,
            std::uint32_t to = ~0u) {
  const auto& fences = history.fences[static_cast<std::size_t>(thread)];
  auto fence = std::upper_bound(fences.begin(), fences.end(), after,
                                [](std::uint64_t time, const Moment& moment) { return time < moment.time; });
  for (; fence != fences.end() && fence->time < before; ++fence) {
    if (fence->epoch >= from && fence->epoch < to) return true;
  }
  return false;
}

// Whether a later atomic of its block makes an access visible to whoever sees the atomic.
bool released(const History& history, const Access& access, const Atomic& by) {
  if (by.time < access.time) return false;
  if (by.thread == access.thread) return fenced(history, access.thread, access.time, by.time);
  return by.epoch > access.epoch && (fenced(history, access.thread, access.time, by.time, 0, by.epoch) ||
                                     fenced(history, by.thread, access.time, by.time, access.epoch + 1));
}

// Whether an access sees what an earlier atomic of its block saw.
bool acquired(const History& history, const Access& access, const Atomic& by) {
  if (by.time > access.time) return false;
  if (by.thread == access.thread) return fenced(history, access.thread, by.time, access.time);
  return access.epoch > by.epoch && (fenced(history, access.thread, by.time, access.time, by.epoch + 1) ||
                                     fenced(history, by.thread, by.time, access.time, 0, access.epoch));
}

bool ordered_between_blocks(const Access& before, const Access& access) {
  const History& theirs = histories[before.block];
  const History& ours = histories[access.block];
  for (const Atomic& release : theirs.atomics) {
    if (!released(theirs, before, release)) continue;
    for (const Atomic& acquire : ours.atomics) {
      if (acquire.address == release.address && acquire.time > release.time && acquired(ours, access, acquire)) {
        return true;
      }
    }
  }
  return false;
}

bool conflict(const Access& before, const Access& access, const void* address) {
  if (before.block == 0) return false;
  if (before.block != access.block) { return !private_to_block(address) && !ordered_between_blocks(before, access); }
  if (before.thread == access.thread || before.epoch != access.epoch) return false;
  return before.thread / kWarp != access.thread / kWarp || before.warp_epoch == access.warp_epoch;
}

// "file:line" where addr2line can tell, otherwise the name of the function.
std::string code_at(const void* from) {
  Dl_info info = {};
  if (dladdr(from, &info) == 0) return format("%p", from);
  const auto offset = static_cast<const char*>(from) - static_cast<const char*>(info.dli_fbase) - 1;
  const std::string command = format("addr2line -i -e '%s' %#tx 2>/dev/null", info.dli_fname, offset);
  std::string lines;
  if (std::FILE* pipe = popen(command.c_str(), "r")) {
    char line[1024];
    while (std::fgets(line, sizeof line, pipe) != nullptr) {
      std::string text(line, std::strcspn(line, " \n"));
      text.erase(0, text.find_last_of('/') + 1);
      lines += (lines.empty() ? "" : " < ") + text;
    }
    pclose(pipe);
  }
  if (!lines.empty() && lines[0] != '?') return lines;
  return info.dli_sname == nullptr ? format("%p", from) : info.dli_sname;
}

[[noreturn]] void report(const void* address, const Access& before, bool stored, const Access& access, bool stores) {
  Block& block = Block::active();
  const auto offset = static_cast<const unsigned char*>(address) - block.shared();
  const std::string where = block.in_shared(address, 1) ? format("byte %td of dynamic shared memory", offset)
                            : private_to_block(address) ? std::string("a byte of static shared memory")
                                                        : format("the byte at %p of device memory", address);
  const std::string who = before.block == access.block ? format("thread %d", before.thread)
                                                       : format("thread %d of another block", before.thread);
  block.stop(format("race: %s %s (%s), which %s %s (%s), and nothing orders the two", stores ? "stores to" : "loads",
                    where.c_str(), code_at(access.from).c_str(), who.c_str(), stored ? "stored to" : "loaded",
                    code_at(before.from).c_str()));
}

[[noreturn]] void report_constant(const void* address, const Access& load, const Access& store) {
  Block::active().stop(format("the byte at %p is loaded by __ldg (%s) and stored to (%s) in one launch", address,
                              code_at(load.from).c_str(), code_at(store.from).c_str()));
}

Byte& byte_at(const unsigned char* address) {
  const auto number = reinterpret_cast<std::uintptr_t>(address);
  return memory[number / kChunk][number % kChunk];
}

}  // namespace

void launch_begins() {
  memory.clear();
  histories.clear();
  n_blocks = 0;
}

void block_begins() {
  if (!enabled) return;
  const Statics statics = find_statics();
  clock_of_block = {++n_blocks, 1, std::vector<std::uint32_t>(1024 / kWarp, 1), statics.begin, statics.end};
}

void barrier_passed() { ++clock_of_block.epoch; }
void warp_synced(int warp) {
  if (enabled) ++clock_of_block.warp_epochs[static_cast<std::size_t>(warp)];
}
void fence() {
  if (!enabled) return;
  const auto thread = static_cast<std::size_t>(Block::active().current());
  histories[clock_of_block.number].fences[thread].push_back({++now, clock_of_block.epoch});
}
void atomic(const void* address) {
  if (!enabled) return;
  histories[clock_of_block.number].atomics.push_back({address, Block::active().current(), ++now, clock_of_block.epoch});
}

void copy_begins(const void* shared, std::size_t bytes, const void* from) {
  touch(shared, bytes, Kind::store, from);
  if (!enabled) return;
  for (std::size_t i = 0; i < bytes; ++i) {
    Byte& byte = byte_at(static_cast<const unsigned char*>(shared) + i);
    byte.copy = byte.store;
  }
}

void copy_ends(const void* shared, std::size_t bytes) {
  if (!enabled) return;
  for (std::size_t i = 0; i < bytes; ++i) byte_at(static_cast<const unsigned char*>(shared) + i).copy.block = 0;
}

void touch(const void* address, std::size_t bytes, Kind kind, const void* from) {
  if (!enabled || !Block::in_kernel()) return;
  Block& block = Block::active();
  if (block.on_stack(address)) return;
  const bool store = kind == Kind::store;
  const int thread = block.current();
  const auto warp = static_cast<std::size_t>(thread / kWarp);
  const Access access{
      clock_of_block.number, clock_of_block.epoch, clock_of_block.warp_epochs[warp], thread, ++now, from};
  for (std::size_t i = 0; i < bytes; ++i) {
    const auto* at = static_cast<const unsigned char*>(address) + i;
    Byte& byte = byte_at(at);
    if (byte.copy.block == access.block) {
      block.stop(format("%s touches byte %td of dynamic shared memory while a copy to it (%s) is under way",
                        code_at(from).c_str(), at - block.shared(), code_at(byte.copy.from).c_str()));
    }
    if (conflict(byte.store, access, at)) report(at, byte.store, true, access, store);
    if (kind == Kind::constant_load && byte.store.block != 0) report_constant(at, access, byte.store);
    if (store && byte.constant.block != 0) report_constant(at, byte.constant, access);
    if (kind == Kind::constant_load) byte.constant = access;
    if (store) {
      for (const Access& load : byte.loads) {
        if (conflict(load, access, at)) report(at, load, false, access, true);
      }
      byte.store = access;
      continue;
    }
    const Access& last = byte.loads[0];
    const bool same_time = last.block == access.block && last.epoch == access.epoch;
    const bool other_warp = last.thread / kWarp != thread / kWarp;
    const Access& other = byte.loads[1];
    const bool other_is_needed =
        other.block == access.block && other.epoch == access.epoch && other.thread / kWarp != thread / kWarp;
    if (same_time && (other_warp || (last.thread != thread && !other_is_needed))) byte.loads[1] = last;
    byte.loads[0] = access;
  }
}

}  // namespace cortexloop::emulation::races

// --- What instrumented code calls ------------------------------------------------------------------------------------

namespace races = cortexloop::emulation::races;

#define CALLER __builtin_return_address(0)
#define ACCESS(name, kind, bytes)                                                                                  \
  extern "C" void __tsan_##name##bytes(void* address) { races::touch(address, bytes, races::Kind::kind, CALLER); } \
  extern "C" void __tsan_volatile_##name##bytes(void* address) {                                                   \
    races::touch(address, bytes, races::Kind::kind, CALLER);                                                       \
  }                                                                                                                \
  extern "C" void __tsan_unaligned_##name##bytes(void* address) {                                                  \
    races::touch(address, bytes, races::Kind::kind, CALLER);                                                       \
  }

ACCESS(read, load, 1)
ACCESS(read, load, 2)
ACCESS(read, load, 4)
ACCESS(read, load, 8)
ACCESS(read, load, 16)
ACCESS(write, store, 1)
ACCESS(write, store, 2)
ACCESS(write, store, 4)
ACCESS(write, store, 8)
ACCESS(write, store, 16)

extern "C" void __tsan_read_range(void* address, std::size_t bytes) {
  races::touch(address, bytes, races::Kind::load, CALLER);
}
extern "C" void __tsan_write_range(void* address, std::size_t bytes) {
  races::touch(address, bytes, races::Kind::store, CALLER);
}
extern "C" void __tsan_init() { races::enabled = true; }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}

// What -fsanitize=alignment calls; the layout is part of the compilers' interface.
struct TypeMismatch {
  struct {
    const char* file;
    std::uint32_t line;
    std::uint32_t column;
  } site;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(TypeMismatch* mismatch, std::uintptr_t address) {
  if (!cortexloop::emulation::Block::in_kernel()) return;
  const auto place = cortexloop::emulation::place({mismatch->site.file, static_cast<int>(mismatch->site.line)});
  cortexloop::emulation::misuse("misaligned: address %#tx is not a multiple of %d, at %s", address,
                                1 << mismatch->log_alignment, place.c_str());
}
