// What a warp does together.
#pragma once

#include <array>
#include <string>

#include "emulation.h"

namespace cortexloop::emulation {

constexpr int kWarp = 32;

// What a lane has come with.
struct Arrival {
  void* operands;
  Site site;
};
using Lanes = std::array<Arrival, kWarp>;

// Does the operation for the lanes of `mask`; `error` gets a sentence if they misuse it.
void execute(Kind kind, std::uint32_t mask, const Lanes& lanes, std::string* error);

}  // namespace cortexloop::emulation
