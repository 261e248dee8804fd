// How the core reports errors: a status, and a sentence for people kept per thread. No exceptions cross this boundary.
#pragma once

namespace cortexloop {

enum class Status { ok, invalid_argument, out_of_memory, device_error };

// The sentence of the last failure on this thread; "" if there was none.
const char* last_error();

// Store a sentence and return `status`: `return fail(Status::invalid_argument, "...")`.
Status fail(Status status, const char* format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

}  // namespace cortexloop
