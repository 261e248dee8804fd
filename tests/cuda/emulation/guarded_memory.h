// Memory between two pages that cannot be accessed; its end touches the second one.
#pragma once

#include <cstddef>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

namespace cortexloop::emulation {

class GuardedMemory {
 public:
  GuardedMemory() = default;
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }
  void reserve(std::size_t bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    capacity_ = (bytes + page - 1) / page * page;
    mapped_ = capacity_ + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(memory);
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + capacity_, page, PROT_NONE);
    begin_ = base_ + page;
  }
  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + capacity_; }
  std::size_t size() const { return capacity_; }
  bool holds(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= begin() && byte < end();
  }
  bool guards(const void* address) const {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= base_ && byte < base_ + mapped_ && !holds(address);
  }

 private:
  unsigned char* base_ = nullptr;
  unsigned char* begin_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t mapped_ = 0;
};

}  // namespace cortexloop::emulation
