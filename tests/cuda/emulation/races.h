// Finds accesses that no barrier orders, in a build whose kernels report every load and store.
//
// Compiled with -fsanitize=thread, a kernel calls __tsan_read4 and the like before every access. Here they are not
// ThreadSanitizer's (the build does not link it): two accesses to a byte by different threads, one of them a store,
// must be separated by __syncthreads, or within a warp by __syncwarp. Between blocks, the first must be followed by a
// __threadfence and an atomic, the second preceded by an atomic on the same address and a __threadfence; where not all of
// these are the accessing thread's own, __syncthreads lies in between. Other
// warp instructions order nothing, atomics are exempt. A byte that is loaded by __ldg is stored to nowhere in the launch. With -fsanitize=alignment, an address that is not as aligned as its
// type is reported too.
#pragma once

#include <cstddef>

namespace cortexloop::emulation::races {

void launch_begins();
void block_begins();
void barrier_passed();
void warp_synced(int warp);
void fence();
void atomic(const void* address);

// An asynchronous copy to these bytes begins, or has been waited for; in between nobody may touch them.
void copy_begins(const void* shared, std::size_t bytes, const void* from);
void copy_ends(const void* shared, std::size_t bytes);

enum class Kind { load, constant_load, store };  // a constant load takes memory that the launch stores nothing to

// An access of the current thread; `from` is the address of the code. Does nothing in a build without checks.
void touch(const void* address, std::size_t bytes, Kind kind, const void* from);

}  // namespace cortexloop::emulation::races
