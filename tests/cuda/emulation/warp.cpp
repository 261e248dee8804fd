#include "warp.h"

#include "state.h"

namespace cortexloop::emulation {
namespace {

std::uint16_t half_bits(std::uint32_t pair, int i) { return static_cast<std::uint16_t>(pair >> (16 * i)); }

void matrix_product(const Lanes& lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operands = *static_cast<const MmaOperands*>(lanes[lane].operands);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r)
        a[g + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = half_to_float(half_bits(operands.a[r], i));
      for (int r = 0; r < 2; ++r) b[2 * t + i + 8 * r][g] = half_to_float(half_bits(operands.b[r], i));
      for (int r = 0; r < 2; ++r) d[g + 8 * r][2 * t + i] = operands.d[2 * r + i];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];  // the product of two halves is exact
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operands = *static_cast<const MmaOperands*>(lanes[lane].operands);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) operands.d[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
  ++settings.matrix_instructions;
}

// Of tf32 operands. Bits that tf32 does not have must be zero: what an instruction makes of others is not specified.
void tf32_product(const Lanes& lanes, std::string* error) {
  float a[16][8], b[8][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operands = *static_cast<const Mma1688Operands*>(lanes[lane].operands);
    const int g = lane / 4, t = lane % 4;
    std::uint32_t all = 0;
    for (int r = 0; r < 4; ++r) {
      a[g + 8 * (r % 2)][t + 4 * (r / 2)] = bits_as<float>(operands.a[r]);
      all |= operands.a[r];
    }
    for (int r = 0; r < 2; ++r) {
      b[t + 4 * r][g] = bits_as<float>(operands.b[r]);
      all |= operands.b[r];
    }
    if ((all & 0x1fffu) != 0) {
      *error = format("mma_1688 at %s: lane %d has an operand that is not a tf32 number",
                      place(lanes[lane].site).c_str(), lane);
      return;
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = operands.d[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 8; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];  // 11 bits by 11: the product is exact
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operands = *static_cast<const Mma1688Operands*>(lanes[lane].operands);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) operands.d[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
  ++settings.matrix_instructions;
}

void load_matrices(const Lanes& lanes, int count, bool transposed) {
  for (int m = 0; m < count; ++m) {
    std::uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(matrix[row], static_cast<const LdmatrixOperands*>(lanes[8 * m + row].operands)->row, 16);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const std::uint32_t low = transposed ? matrix[t][g] : matrix[g][t];
      const std::uint32_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<const LdmatrixOperands*>(lanes[lane].operands)->r[m] = high << 16 | low;
    }
  }
}

void shuffle_values(Kind kind, const Lanes& lanes, std::uint32_t mask, std::string* error) {
  std::uint32_t values[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1u) values[lane] = static_cast<const ShuffleOperands*>(lanes[lane].operands)->value;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    auto& operands = *static_cast<ShuffleOperands*>(lanes[lane].operands);
    const int begin = lane / operands.width * operands.width;
    const int end = begin + operands.width;
    int source = lane;
    switch (kind) {
      case Kind::shuffle: source = begin + (operands.other & (operands.width - 1)); break;
      case Kind::shuffle_xor: source = (lane ^ operands.other) < end ? lane ^ operands.other : lane; break;
      case Kind::shuffle_down: source = lane + operands.other < end ? lane + operands.other : lane; break;
      default: source = lane - operands.other >= begin ? lane - operands.other : lane; break;
    }
    if ((mask >> source & 1u) == 0) {
      *error = format("%s at %s reads lane %d, which its mask %08x leaves out", name_of(kind),
                      place(lanes[lane].site).c_str(), source, mask);
      return;
    }
    operands.value = values[source];
  }
}

void reduce_values(Kind kind, const Lanes& lanes, std::uint32_t mask) {
  std::uint32_t result = kind == Kind::reduce_min ? ~0u : 0u;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const std::uint32_t value = *static_cast<const std::uint32_t*>(lanes[lane].operands);
    switch (kind) {
      case Kind::ballot: result |= value << lane; break;
      case Kind::reduce_max: result = max(result, value); break;
      case Kind::reduce_min: result = min(result, value); break;
      default: result += value; break;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1u) *static_cast<std::uint32_t*>(lanes[lane].operands) = result;
  }
}

}  // namespace

void execute(Kind kind, std::uint32_t mask, const Lanes& lanes, std::string* error) {
  switch (kind) {
    case Kind::barrier:
    case Kind::syncwarp: break;
    case Kind::shuffle:
    case Kind::shuffle_xor:
    case Kind::shuffle_down:
    case Kind::shuffle_up: shuffle_values(kind, lanes, mask, error); break;
    case Kind::ballot:
    case Kind::reduce_max:
    case Kind::reduce_min:
    case Kind::reduce_add: reduce_values(kind, lanes, mask); break;
    case Kind::mma_16816: matrix_product(lanes); break;
    case Kind::mma_1688: tf32_product(lanes, error); break;
    case Kind::ldmatrix_x4: load_matrices(lanes, 4, false); break;
    case Kind::ldmatrix_x4_trans: load_matrices(lanes, 4, true); break;
    case Kind::ldmatrix_x2: load_matrices(lanes, 2, false); break;
  }
}

}  // namespace cortexloop::emulation
