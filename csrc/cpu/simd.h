// The one place with intrinsics: a float vector of the instruction set this file is compiled for.
//
// Included only from isa_<name>.cpp, which compiles all kernels once per instruction set. Everything is in an anonymous
// namespace, so that no copy compiled for a newer processor can be picked by the linker for an older one. No static vectors,
// no std:: templates.
//
//   vf        kLanes floats            vmask   one bit per lane, stored as kLanes bits of a std::uint16_t
//   vfma(a, b, c) = a * b + c, fused where the instruction set has it
#pragma once

#include <cstdint>
#include <cstring>

#if defined(CORTEXLOOP_ISA_AVX512) || defined(CORTEXLOOP_ISA_AVX2)
#include <immintrin.h>
#elif defined(CORTEXLOOP_ISA_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#define CORTEXLOOP_SSE2 1
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define CL_INLINE __forceinline
#define CL_NOINLINE __declspec(noinline)
#define CL_RESTRICT __restrict
#define CL_UNROLL
#else
#define CL_INLINE inline __attribute__((always_inline))
#define CL_NOINLINE __attribute__((noinline))  // each hot loop gets the registers for itself
#define CL_RESTRICT __restrict__
#define CL_UNROLL _Pragma("GCC unroll 32")
#endif

namespace cortexloop {
namespace cpu {
namespace {

#if defined(CORTEXLOOP_ISA_AVX512)

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using vf = __m512;
CL_INLINE vf vzero() { return _mm512_setzero_ps(); }
CL_INLINE vf vset1(float x) { return _mm512_set1_ps(x); }
CL_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
CL_INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
CL_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
CL_INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
CL_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
CL_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// NaN passes through: maxps returns its second operand when either is NaN.
CL_INLINE vf vrelu(vf x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }
CL_INLINE std::uint16_t vpositive(vf x) {
  return static_cast<std::uint16_t>(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ));
}
CL_INLINE vf vwhere(std::uint16_t bits, vf x) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x); }

#elif defined(CORTEXLOOP_ISA_AVX2)

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using vf = __m256;
CL_INLINE vf vzero() { return _mm256_setzero_ps(); }
CL_INLINE vf vset1(float x) { return _mm256_set1_ps(x); }
CL_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
CL_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
CL_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
CL_INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
CL_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
CL_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
CL_INLINE vf vrelu(vf x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }
CL_INLINE std::uint16_t vpositive(vf x) {
  return static_cast<std::uint16_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ)));
}
CL_INLINE vf vwhere(std::uint16_t bits, vf x) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane_bit), lane_bit);
  return _mm256_and_ps(x, _mm256_castsi256_ps(on));
}

#elif defined(CORTEXLOOP_ISA_NEON)

constexpr int kLanes = 4;
constexpr int kRegisters = 32;
using vf = float32x4_t;
CL_INLINE vf vzero() { return vdupq_n_f32(0.0f); }
CL_INLINE vf vset1(float x) { return vdupq_n_f32(x); }
CL_INLINE vf vload(const float* p) { return vld1q_f32(p); }
CL_INLINE void vstore(float* p, vf x) { vst1q_f32(p, x); }
CL_INLINE vf vadd(vf a, vf b) { return vaddq_f32(a, b); }
CL_INLINE vf vsub(vf a, vf b) { return vsubq_f32(a, b); }
CL_INLINE vf vmul(vf a, vf b) { return vmulq_f32(a, b); }
CL_INLINE vf vfma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
CL_INLINE vf vrelu(vf x) { return vmaxq_f32(vdupq_n_f32(0.0f), x); }  // NaN passes through
CL_INLINE uint32x4_t lane_bits() {
  const std::uint32_t bits[4] = {1, 2, 4, 8};
  return vld1q_u32(bits);
}
CL_INLINE std::uint16_t vpositive(vf x) {
  return static_cast<std::uint16_t>(vaddvq_u32(vandq_u32(vcgtq_f32(x, vdupq_n_f32(0.0f)), lane_bits())));
}
CL_INLINE vf vwhere(std::uint16_t bits, vf x) {
  const uint32x4_t on = vtstq_u32(vdupq_n_u32(bits), lane_bits());
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), on));
}

#elif defined(CORTEXLOOP_SSE2)

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
using vf = __m128;
CL_INLINE vf vzero() { return _mm_setzero_ps(); }
CL_INLINE vf vset1(float x) { return _mm_set1_ps(x); }
CL_INLINE vf vload(const float* p) { return _mm_loadu_ps(p); }
CL_INLINE void vstore(float* p, vf x) { _mm_storeu_ps(p, x); }
CL_INLINE vf vadd(vf a, vf b) { return _mm_add_ps(a, b); }
CL_INLINE vf vsub(vf a, vf b) { return _mm_sub_ps(a, b); }
CL_INLINE vf vmul(vf a, vf b) { return _mm_mul_ps(a, b); }
CL_INLINE vf vfma(vf a, vf b, vf c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
CL_INLINE vf vrelu(vf x) { return _mm_max_ps(_mm_setzero_ps(), x); }
CL_INLINE std::uint16_t vpositive(vf x) {
  return static_cast<std::uint16_t>(_mm_movemask_ps(_mm_cmpgt_ps(x, _mm_setzero_ps())));
}
CL_INLINE vf vwhere(std::uint16_t bits, vf x) {
  const __m128i lane_bit = _mm_setr_epi32(1, 2, 4, 8);
  const __m128i on = _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(bits), lane_bit), lane_bit);
  return _mm_and_ps(x, _mm_castsi128_ps(on));
}

#else

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
struct vf {
  float lane[kLanes];
};
template <class F>
CL_INLINE vf each_lane(F f) {
  vf r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = f(i);
  return r;
}
CL_INLINE vf vset1(float x) {
  return each_lane([=](int) { return x; });
}
CL_INLINE vf vzero() { return vset1(0.0f); }
CL_INLINE vf vload(const float* p) {
  return each_lane([=](int i) { return p[i]; });
}
CL_INLINE void vstore(float* p, vf x) {
  for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i];
}
CL_INLINE vf vadd(vf a, vf b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
CL_INLINE vf vsub(vf a, vf b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
CL_INLINE vf vmul(vf a, vf b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
CL_INLINE vf vfma(vf a, vf b, vf c) { return vadd(vmul(a, b), c); }
CL_INLINE vf vrelu(vf x) {
  return each_lane([&](int i) { return x.lane[i] < 0.0f ? 0.0f : x.lane[i]; });
}
CL_INLINE std::uint16_t vpositive(vf x) {
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (x.lane[i] > 0.0f ? 1u : 0u) << i;
  return static_cast<std::uint16_t>(bits);
}
CL_INLINE vf vwhere(std::uint16_t bits, vf x) {
  return each_lane([&](int i) { return (bits >> i & 1) != 0 ? x.lane[i] : 0.0f; });
}

#endif

#if defined(CORTEXLOOP_ISA_BF16)
// Float slots here hold two bfloat16 each: c + a.low * b.low + a.high * b.high, products and sums in float.
CL_INLINE vf vdot_pairs(vf a, vf b, vf c) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
// Lane by lane (a, b) rounded to bfloat16, a in the low half of the slot.
CL_INLINE vf vpair(vf a, vf b) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
}
// 16 floats rounded to bfloat16 into 8 float slots.
CL_INLINE void vstore_pairs(float* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

// kLanes float16 or bfloat16 numbers as floats, exactly; infinities and NaN stay what they are.
#if defined(CORTEXLOOP_ISA_AVX512)
CL_INLINE vf vload_f16(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
CL_INLINE vf vload_bf16(const std::uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
#elif defined(CORTEXLOOP_ISA_AVX2)
CL_INLINE vf vload_f16(const std::uint16_t* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi32(0x7fff));
  const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(x, magnitude), 16);
  const __m256i rebias = _mm256_set1_epi32(112 << 23);  // twice that where all ones are to stay all ones
  const __m256i infinite = _mm256_and_si256(_mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7bff)), rebias);
  const __m256i large = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 13), _mm256_add_epi32(rebias, infinite));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(1.0f / 16777216.0f));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x400), magnitude);
  const __m256 value = _mm256_blendv_ps(_mm256_castsi256_ps(large), small, _mm256_castsi256_ps(is_small));
  return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
}
CL_INLINE vf vload_bf16(const std::uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
#else
CL_INLINE vf vload_bits(const std::uint32_t* bits) {
  float values[kLanes];
  std::memcpy(values, bits, sizeof values);
  return vload(values);
}
// Plain loops, which compilers turn into vectors; subnormal numbers by an integer conversion, whatever the processor's mode.
CL_INLINE vf vload_f16(const std::uint16_t* p) {
  std::uint32_t bits[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const std::uint32_t magnitude = p[i] & 0x7fffu, sign = static_cast<std::uint32_t>(p[i] & 0x8000u) << 16;
    const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * (1.0f / 16777216.0f);
    std::uint32_t small_bits;
    std::memcpy(&small_bits, &small, sizeof small);
    const std::uint32_t large = (magnitude << 13) + (magnitude < 0x7c00u ? 0x38000000u : 0x70000000u);
    bits[i] = sign | (magnitude < 0x400u ? small_bits : large);
  }
  return vload_bits(bits);
}
CL_INLINE vf vload_bf16(const std::uint16_t* p) {
  std::uint32_t bits[kLanes];
  for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<std::uint32_t>(p[i]) << 16;
  return vload_bits(bits);
}
#endif

// Ask for the cache line at `p`, which will be read soon, into the second-level cache.
CL_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#elif defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
#else
  static_cast<void>(p);
#endif
}

// Keep x in a register: without it GCC reloads a vector from memory at every use, and the products become bound by loads.
CL_INLINE void vkeep(vf& x) {
#if defined(CORTEXLOOP_ISA_AVX512) && defined(__GNUC__)
  __asm__("" : "+v"(x));
#elif (defined(CORTEXLOOP_ISA_AVX2) || defined(CORTEXLOOP_SSE2)) && defined(__GNUC__)
  __asm__("" : "+x"(x));
#elif defined(CORTEXLOOP_ISA_NEON) && defined(__GNUC__)
  __asm__("" : "+w"(x));
#else
  static_cast<void>(x);
#endif
}

// Hide where a pointer came from: GCC otherwise turns `p + constant` into as many precomputed offsets as there are uses,
// which do not fit the registers.
CL_INLINE void opaque(const float*& p) {
#if defined(__GNUC__)
  __asm__("" : "+r"(p));
#else
  static_cast<void>(p);
#endif
}

// Four floats: RGB pixels, whose fourth lane carries something that is never stored, or two pairs of neighbouring pixels.
// v4_pairs(p, q) = {p[0], p[1], q[0], q[1]}; v4_store_low and v4_store_high store the first and the second pair.
#if defined(CORTEXLOOP_ISA_NEON)
using v4 = float32x4_t;
CL_INLINE v4 v4_load(const float* p) { return vld1q_f32(p); }
CL_INLINE v4 v4_add(v4 a, v4 b) { return vaddq_f32(a, b); }
CL_INLINE void v4_store(float* p, v4 x) { vst1q_f32(p, x); }
CL_INLINE v4 v4_set1(float x) { return vdupq_n_f32(x); }
CL_INLINE v4 v4_mul(v4 a, v4 b) { return vmulq_f32(a, b); }
CL_INLINE v4 v4_fma(v4 a, v4 b, v4 c) { return vfmaq_f32(c, a, b); }
CL_INLINE v4 v4_pairs(const float* p, const float* q) { return vcombine_f32(vld1_f32(p), vld1_f32(q)); }
CL_INLINE void v4_store_low(float* p, v4 x) { vst1_f32(p, vget_low_f32(x)); }
CL_INLINE void v4_store_high(float* p, v4 x) { vst1_f32(p, vget_high_f32(x)); }
#elif defined(__SSE2__) || defined(_M_X64)
using v4 = __m128;
CL_INLINE v4 v4_load(const float* p) { return _mm_loadu_ps(p); }
CL_INLINE v4 v4_add(v4 a, v4 b) { return _mm_add_ps(a, b); }
CL_INLINE void v4_store(float* p, v4 x) { _mm_storeu_ps(p, x); }
CL_INLINE v4 v4_set1(float x) { return _mm_set1_ps(x); }
CL_INLINE v4 v4_mul(v4 a, v4 b) { return _mm_mul_ps(a, b); }
#if defined(CORTEXLOOP_ISA_AVX512) || defined(CORTEXLOOP_ISA_AVX2)
CL_INLINE v4 v4_fma(v4 a, v4 b, v4 c) { return _mm_fmadd_ps(a, b, c); }
#else
CL_INLINE v4 v4_fma(v4 a, v4 b, v4 c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
#endif
CL_INLINE v4 v4_pairs(const float* p, const float* q) {
  const __m128 low = _mm_loadl_pi(_mm_setzero_ps(), reinterpret_cast<const __m64*>(p));
  return _mm_loadh_pi(low, reinterpret_cast<const __m64*>(q));
}
CL_INLINE void v4_store_low(float* p, v4 x) { _mm_storel_pi(reinterpret_cast<__m64*>(p), x); }
CL_INLINE void v4_store_high(float* p, v4 x) { _mm_storeh_pi(reinterpret_cast<__m64*>(p), x); }
#else
using v4 = vf;
CL_INLINE v4 v4_load(const float* p) { return vload(p); }
CL_INLINE v4 v4_add(v4 a, v4 b) { return vadd(a, b); }
CL_INLINE void v4_store(float* p, v4 x) { vstore(p, x); }
CL_INLINE v4 v4_set1(float x) { return vset1(x); }
CL_INLINE v4 v4_mul(v4 a, v4 b) { return vmul(a, b); }
CL_INLINE v4 v4_fma(v4 a, v4 b, v4 c) { return vfma(a, b, c); }
CL_INLINE v4 v4_pairs(const float* p, const float* q) {
  return each_lane([=](int i) { return i < 2 ? p[i] : q[i - 2]; });
}
CL_INLINE void v4_store_low(float* p, v4 x) {
  for (int i = 0; i < 2; ++i) p[i] = x.lane[i];
}
CL_INLINE void v4_store_high(float* p, v4 x) {
  for (int i = 0; i < 2; ++i) p[i] = x.lane[i + 2];
}
#endif

// Sum of the lanes, always in the order of a binary tree over lane numbers.
CL_INLINE float vsum(vf x) {
  float lane[kLanes];
  vstore(lane, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

}  // namespace
}  // namespace cpu
}  // namespace cortexloop
