// Vectors of 64-bit ARM in the words of kernels_impl.h.
#pragma once

namespace moe::MOE_ISA {

constexpr int64_t kWidth = 4;
constexpr int64_t kTileRows = 6;                                          // 24 sums, four weights and a row's value
constexpr int64_t vectors_per_half(int64_t m) { return m <= 3 ? 4 : 2; }  // of a panel, at once, for m rows
constexpr int64_t kDotRows = 4, kDotWeights = 4;

constexpr decltype(Kernels::choose_of_256) choose = nullptr;
constexpr decltype(Kernels::rank_choices) rank = nullptr;
constexpr decltype(Kernels::find_places) find = nullptr;

using V = float32x4_t;
using U = uint32x4_t;

inline void prefetch(const void* p) {
#if defined(MOE_MSVC)
  __prefetch(p);
#else
  __builtin_prefetch(p);
#endif
}
inline V zero() { return vdupq_n_f32(0); }
inline V splat(float x) { return vdupq_n_f32(x); }
inline V load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, V a) { vst1q_f32(p, a); }
inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V div(V a, V b) { return vdivq_f32(a, b); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V least(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline V most(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline V where_greater(V a, V b, V yes, V no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
inline uint64_t reaches(V a, V b) {
  const uint32_t bit[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), vld1q_u32(bit)));
}
inline V nearest(V a) { return vrndnq_f32(a); }
// In two steps, for 2^n alone may be beyond the floats.
inline V times_power(V a, V n) {
  const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1), rest = vsubq_s32(whole, half);
  const int32x4_t one = vdupq_n_s32(127);
  const V first = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, one), 23));
  const V second = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, one), 23));
  return mul(mul(a, first), second);
}
inline float sum_of(V a) {
  const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(vpadd_f32(b, b), 0);
}
inline float highest_of(V a) { return vmaxvq_f32(a); }

inline V load(const bf16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
inline V load(const f16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
inline void store(bf16* p, V a) {
  const U bits = vreinterpretq_u32_f32(a);
  const U odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const U rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const U quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16));
}
inline void store(f16* p, V a) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a))); }

inline void load_halves(const float* row, int64_t v, V& first, V& second) {
  first = load(row + v * kWidth);
  second = load(row + kHalf + v * kWidth);
}
inline U load_words(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
inline void store_words(void* p, U a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u32(a)); }
inline void load_halves(const bf16* row, int64_t v, V& first, V& second) {
  const U pairs = load_words(row + 2 * kWidth * v);
  first = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
  second = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
}
inline void load_halves(const f16* row, int64_t v, V& first, V& second) {
  const U pairs = load_words(row + 2 * kWidth * v);
  first = vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(pairs)));
  second = vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32(pairs, 16)));
}

inline U zip(const void* low, const void* high) {
  const uint16x4_t a = vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(low)));
  const uint16x4_t b = vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(high)));
  return vorrq_u32(vmovl_u16(a), vshll_n_u16(b, 16));
}
inline void transpose(U* a) {
  const U t[4] = {vtrn1q_u32(a[0], a[1]), vtrn2q_u32(a[0], a[1]), vtrn1q_u32(a[2], a[3]), vtrn2q_u32(a[2], a[3])};
  a[0] = vcombine_u32(vget_low_u32(t[0]), vget_low_u32(t[2]));
  a[1] = vcombine_u32(vget_low_u32(t[1]), vget_low_u32(t[3]));
  a[2] = vcombine_u32(vget_high_u32(t[0]), vget_high_u32(t[2]));
  a[3] = vcombine_u32(vget_high_u32(t[1]), vget_high_u32(t[3]));
}

}  // namespace moe::MOE_ISA
