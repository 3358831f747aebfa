// SPDX-License-Identifier: Apache-2.0
// The vector type of the NEON kernels: 4 floats. Part of every aarch64 processor.
#pragma once

#include <arm_neon.h>
#include <stdint.h>

namespace fewbit {
namespace {

constexpr int kLanes = 4;
constexpr bool kSumTables = false;
constexpr int kUnroll = FEWBIT_UNROLL < 8 ? FEWBIT_UNROLL : 8;  // more only makes the compiler slow
// Row groups beside 1, 2, 4 and 8 tokens: 32 registers in all.
constexpr int kGroups1 = 4, kGroups2 = 4, kGroups4 = 4, kGroups8 = 2;

typedef float32x4_t F;
typedef uint32x4_t U;

inline F broadcast(float x) { return vdupq_n_f32(x); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F larger(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where either is NaN
inline F multiply(F a, F b) { return vmulq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F fused(F a, F b, F c) { return fma(a, b, c); }

inline U load_lanes(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
// Bytes, one a lane.
inline U load_bytes(const uint8_t* p) { return U{p[0], p[1], p[2], p[3]}; }
inline U combine(U a, U b) { return vorrq_u32(a, b); }
inline void store_lanes(uint8_t* p, U a) { vst1q_u8(p, vreinterpretq_u8_u32(a)); }
inline void keep(U&) {}
inline U repeat(uint32_t bits) { return vdupq_n_u32(bits); }
inline U mask(U a, U b) { return vandq_u32(a, b); }
inline U mask(U a, uint32_t m) { return vandq_u32(a, vdupq_n_u32(m)); }
inline U select(uint32_t m, U low, U high) { return vbslq_u32(vdupq_n_u32(m), low, high); }
inline U shift_right(U a, int n) { return vshlq_u32(a, vdupq_n_s32(-n)); }
inline U shift_left(U a, int n) { return vshlq_u32(a, vdupq_n_s32(n)); }
inline U flip(U a, uint32_t m) { return veorq_u32(a, vdupq_n_u32(m)); }
inline F convert(U a) { return vcvtq_f32_u32(a); }
inline F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F lookup16(F table, U) { return table; }  // never called: see kSumTables

// Levels of a code; bits of a lane above BITS are ignored.
template <int BITS>
struct Lookup {
  const float* table;
  explicit Lookup(const float* levels) : table(levels) {}
  F operator()(U index) const {
    uint32_t lane[4];
    vst1q_u32(lane, mask(index, (1u << BITS) - 1));
    const float value[4] = {table[lane[0]], table[lane[1]], table[lane[2]], table[lane[3]]};
    return vld1q_f32(value);
  }
};

// Up to 16 levels are 64 bytes in four registers: TBL fetches the four bytes 4 i .. 4 i + 3 of level i.
struct LookupShort {
  uint8x16x4_t levels;
  uint32_t most;
  LookupShort(const float* table, int bits) : most((1u << bits) - 1) {
    for (int v = 0; v < 4; v++) {
      float all[4];
      for (uint32_t i = 0; i < 4; i++) all[i] = table[(static_cast<uint32_t>(v) * 4 + i) & most];
      levels.val[v] = vreinterpretq_u8_f32(vld1q_f32(all));
    }
  }
  F operator()(U index) const {
    const U bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100u), mask(index, most), 0x04040404u);
    return vreinterpretq_f32_u8(vqtbl4q_u8(levels, vreinterpretq_u8_u32(bytes)));
  }
};

template <> struct Lookup<1> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 1) {} };
template <> struct Lookup<2> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 2) {} };
template <> struct Lookup<3> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 3) {} };
template <> struct Lookup<4> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 4) {} };

// 16 bytes; an index of 16 or more gives 0.
struct Shuffle {
  uint8x16_t table;
  Shuffle() = default;
  explicit Shuffle(const uint8_t* bytes) : table(vld1q_u8(bytes)) {}
  U operator()(U index) const { return vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(index))); }
  U within(U index) const { return (*this)(index); }
};

}  // namespace
}  // namespace fewbit
