// SPDX-License-Identifier: Apache-2.0
// The vector type of the AVX-512 kernels: 16 floats. Needs AVX-512 F, BW, VL and DQ.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fewbit {
namespace {

constexpr int kLanes = 16;
constexpr bool kSumTables = true;
constexpr int kUnroll = FEWBIT_UNROLL;
// Row groups beside 1, 2, 4 and 8 tokens: 32 registers in all.
constexpr int kGroups1 = 4, kGroups2 = 4, kGroups4 = 4, kGroups8 = 2;

typedef __m512 F;
typedef __m512i U;

inline F broadcast(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F larger(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fused(F a, F b, F c) { return fma(a, b, c); }

inline U load_lanes(const uint8_t* p) { return _mm512_loadu_si512(p); }
// Bytes, one a lane.
inline U load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline U combine(U a, U b) { return _mm512_or_si512(a, b); }
inline void store_lanes(uint8_t* p, U a) { _mm512_storeu_si512(p, a); }
inline void keep(U& a) { asm("" : "+v"(a)); }  // in a register: no folding of its load into its uses
inline U repeat(uint32_t bits) { return _mm512_set1_epi32(static_cast<int32_t>(bits)); }
inline U mask(U a, U b) { return _mm512_and_si512(a, b); }
inline U mask(U a, uint32_t m) { return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int32_t>(m))); }
inline U select(uint32_t m, U low, U high) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int32_t>(m)), low, high, 0xca);
}
inline U shift_right(U a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
inline U shift_left(U a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
inline U flip(U a, uint32_t m) { return _mm512_xor_si512(a, _mm512_set1_epi32(static_cast<int32_t>(m))); }
inline F convert(U a) { return _mm512_cvtepi32_ps(a); }
inline F load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F lookup16(F table, U index) { return _mm512_permutexvar_ps(index, table); }

// Levels of a code; bits of a lane above BITS are ignored.
template <int BITS>
struct Lookup {
  const float* table;
  explicit Lookup(const float* levels) : table(levels) {}
  F operator()(U index) const { return _mm512_i32gather_ps(mask(index, (1u << BITS) - 1), table, 4); }
};

// Up to 16 levels in one register, repeated so that the 4 bits vpermps reads need no mask.
struct LookupShort {
  F levels;
  LookupShort(const float* table, int bits) {
    float all[16];
    for (int i = 0; i < 16; i++) all[i] = table[i & ((1 << bits) - 1)];
    levels = load(all);
  }
  F operator()(U index) const { return _mm512_permutexvar_ps(index, levels); }
};

template <> struct Lookup<1> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 1) {} };
template <> struct Lookup<2> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 2) {} };
template <> struct Lookup<3> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 3) {} };
template <> struct Lookup<4> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 4) {} };

template <>
struct Lookup<5> {
  F low, high;
  explicit Lookup(const float* table) : low(load(table)), high(load(table + 16)) {}
  F operator()(U index) const { return _mm512_permutex2var_ps(low, index, high); }
};

// 64 levels in four registers; bit 5 of the code picks two of them.
template <>
struct Lookup<6> {
  Lookup<5> low, high;
  explicit Lookup(const float* table) : low(table), high(table + 32) {}
  F operator()(U index) const {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low(index), high(index));
  }
};

}  // namespace
}  // namespace fewbit
