// cuda_fp16.h in software: IEEE binary16, every operation rounded once to nearest even, subnormals kept.
#pragma once

#include <cmath>
#include <cstdint>

#include "emulated_types.h"

namespace cortexloop::emulation {

inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // A subnormal half is a normal float: place the bits as if there were an exponent, then scale by 2^112, exactly.
  return bits_as<float>(bits_as<std::uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f) | sign);
}

// From a double, so that a result which is exact in double, or rounded to odd, is rounded once.
inline std::uint16_t double_to_half(double x) {
  const std::uint64_t bits = bits_as<std::uint64_t>(x);
  const auto sign = static_cast<std::uint16_t>(bits >> 48 & 0x8000u);
  const double magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fffu;
  if (magnitude >= 65520.0) return static_cast<std::uint16_t>(sign | 0x7c00u);
  // In units of the last place, which is 2^-24 below 2^-14; adding 1.5 * 2^52 then rounds to whole units.
  const int exponent = static_cast<int>(bits >> 52 & 0x7ffu) - 1023;
  const int place = (exponent < -14 ? -14 : exponent) - 10;
  const double units = magnitude * bits_as<double>(static_cast<std::uint64_t>(1023 - place) << 52);
  const auto rounded = static_cast<std::uint32_t>((units + 0x1.8p52) - 0x1.8p52);
  // The exponent field is place + 25 for normal numbers (the leading bit, 1024, adds one), 0 for subnormal ones; a
  // carry out of the mantissa moves to the next exponent by itself.
  return static_cast<std::uint16_t>(sign | (static_cast<std::uint32_t>(place + 24) * 1024u + rounded));
}

inline std::uint16_t float_to_half(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // below 2^-14: in units of 2^-24
    const float units = (bits_as<float>(magnitude) * 0x1p24f + 0x1.8p23f) - 0x1.8p23f;
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(units));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<std::uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

}  // namespace cortexloop::emulation

// Conversions are explicit, unlike CUDA's: h + h would else be a sum in float here and in half there. Use __hadd.
struct alignas(2) __half {
  std::uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(cortexloop::emulation::float_to_half(x)) {}
  explicit operator float() const { return cortexloop::emulation::half_to_float(bits); }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half low, __half high) : x(low), y(high) {}
};
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) {
  __half h;
  h.bits = bits;
  return h;
}
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __float2half(float x) { return __half(x); }
inline float __half2float(__half h) { return static_cast<float>(h); }
inline __half __int2half_rn(int x) { return __ushort_as_half(cortexloop::emulation::double_to_half(x)); }
inline __half __uint2half_rn(unsigned x) { return __ushort_as_half(cortexloop::emulation::double_to_half(x)); }
inline __half __ushort2half_rn(unsigned short x) { return __ushort_as_half(cortexloop::emulation::double_to_half(x)); }

// Sums and products of halves are exact in double.
inline __half __hadd(__half a, __half b) {
  return __ushort_as_half(cortexloop::emulation::double_to_half(double{float{a}} + double{float{b}}));
}
inline __half __hsub(__half a, __half b) {
  return __ushort_as_half(cortexloop::emulation::double_to_half(double{float{a}} - double{float{b}}));
}
inline __half __hmul(__half a, __half b) {
  return __ushort_as_half(cortexloop::emulation::double_to_half(double{float{a}} * double{float{b}}));
}
// a * b + c need not be exact in double; rounding it to odd there makes the second rounding right.
inline __half __hfma(__half a, __half b, __half c) {
  const double product = double{float{a}} * double{float{b}};
  const double addend = double{float{c}};
  double sum = product + addend;
  if (std::isfinite(sum)) {
    const double virtual_addend = sum - product;
    const double error = (product - (sum - virtual_addend)) + (addend - virtual_addend);
    if (error != 0.0 && (cortexloop::emulation::bits_as<std::uint64_t>(sum) & 1u) == 0) {
      sum = std::nextafter(sum, error > 0.0 ? HUGE_VAL : -HUGE_VAL);
    }
  }
  return __ushort_as_half(cortexloop::emulation::double_to_half(sum));
}
inline __half __hneg(__half a) { return __ushort_as_half(static_cast<unsigned short>(a.bits ^ 0x8000u)); }
// A NaN loses against a number, and -0 is below +0.
inline __half __hmax(__half a, __half b) {
  const float x{a}, y{b};
  if (std::isnan(x) && std::isnan(y)) return __ushort_as_half(0x7fffu);
  if (std::isnan(x)) return b;
  if (std::isnan(y)) return a;
  if (x == y) return (a.bits & 0x8000u) ? b : a;
  return x > y ? a : b;
}
inline __half __hmin(__half a, __half b) {
  const float x{a}, y{b};
  if (std::isnan(x) && std::isnan(y)) return __ushort_as_half(0x7fffu);
  if (std::isnan(x)) return b;
  if (std::isnan(y)) return a;
  if (x == y) return (a.bits & 0x8000u) ? a : b;
  return x < y ? a : b;
}

inline __half2 __floats2half2_rn(float low, float high) { return {__half(low), __half(high)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline float2 __half22float2(__half2 v) { return {float{v.x}, float{v.y}}; }
inline float __low2float(__half2 v) { return float{v.x}; }
inline float __high2float(__half2 v) { return float{v.y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __half2 __low2half2(__half2 v) { return {v.x, v.x}; }
inline __half2 __high2half2(__half2 v) { return {v.y, v.y}; }
inline __half2 __lows2half2(__half2 a, __half2 b) { return {a.x, b.x}; }
inline __half2 __highs2half2(__half2 a, __half2 b) { return {a.y, b.y}; }
inline __half2 __lowhigh2highlow(__half2 v) { return {v.y, v.x}; }
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hneg2(__half2 a) { return {__hneg(a.x), __hneg(a.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
