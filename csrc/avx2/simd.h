// SPDX-License-Identifier: Apache-2.0
// The vector type of the AVX2 kernels: 8 floats. Needs AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fewbit {
namespace {

constexpr int kLanes = 8;
constexpr bool kSumTables = false;
constexpr int kUnroll = FEWBIT_UNROLL;
// Row groups beside 1, 2, 4 and 8 tokens: 16 registers in all.
constexpr int kGroups1 = 4, kGroups2 = 4, kGroups4 = 2, kGroups8 = 1;

typedef __m256 F;
typedef __m256i U;

inline F broadcast(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F larger(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F fused(F a, F b, F c) { return fma(a, b, c); }

inline U load_lanes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
// Bytes, one a lane.
inline U load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline U combine(U a, U b) { return _mm256_or_si256(a, b); }
inline void store_lanes(uint8_t* p, U a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline void keep(U&) {}
inline U repeat(uint32_t bits) { return _mm256_set1_epi32(static_cast<int32_t>(bits)); }
inline U mask(U a, U b) { return _mm256_and_si256(a, b); }
inline U mask(U a, uint32_t m) { return _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int32_t>(m))); }
inline U select(uint32_t m, U low, U high) {
  const U bits = _mm256_set1_epi32(static_cast<int32_t>(m));
  return _mm256_or_si256(_mm256_and_si256(bits, low), _mm256_andnot_si256(bits, high));
}
inline U shift_right(U a, int n) { return _mm256_srli_epi32(a, n); }
inline U shift_left(U a, int n) { return _mm256_slli_epi32(a, n); }
inline U flip(U a, uint32_t m) { return _mm256_xor_si256(a, _mm256_set1_epi32(static_cast<int32_t>(m))); }
inline F convert(U a) { return _mm256_cvtepi32_ps(a); }
inline F load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F lookup16(F table, U) { return table; }  // never called: see kSumTables

// Levels of a code; bits of a lane above BITS are ignored.
template <int BITS>
struct Lookup {
  const float* table;
  explicit Lookup(const float* levels) : table(levels) {}
  F operator()(U index) const { return _mm256_i32gather_ps(table, mask(index, (1u << BITS) - 1), 4); }
};

// Up to 4 levels in each half of a register, repeated so that the 2 bits vpermilps reads need no mask.
struct LookupShort {
  F levels;
  LookupShort(const float* table, int bits) {
    float all[8];
    for (int i = 0; i < 8; i++) all[i] = table[i & ((1 << bits) - 1)];
    levels = load(all);
  }
  F operator()(U index) const { return _mm256_permutevar_ps(levels, index); }
};

template <> struct Lookup<1> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 1) {} };
template <> struct Lookup<2> : LookupShort { explicit Lookup(const float* table) : LookupShort(table, 2) {} };

// 8 levels in a register, of which vpermps reads 3 bits: it takes 2.6 times as long as vpermilps.
template <>
struct Lookup<3> {
  F levels;
  explicit Lookup(const float* table) : levels(load(table)) {}
  F operator()(U index) const { return _mm256_permutevar8x32_ps(levels, index); }
};

// 16 levels in two registers; bit 3 of the code, moved to the sign, picks one.
template <>
struct Lookup<4> {
  F low, high;
  explicit Lookup(const float* table) : low(load(table)), high(load(table + 8)) {}
  F operator()(U index) const {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
};

}  // namespace
}  // namespace fewbit
