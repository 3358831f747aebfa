// SPDX-License-Identifier: Apache-2.0
// The vector type of the portable kernels: 4 floats in the compiler's own vector extension (GCC, Clang), which becomes
// whatever the target's baseline has, or plain scalar code.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/dtypes.h"

namespace fewbit {
namespace {

constexpr int kLanes = 4;
constexpr bool kSumTables = false;
constexpr int kUnroll = 1;
// Row groups beside 1, 2, 4 and 8 tokens.
constexpr int kGroups1 = 4, kGroups2 = 2, kGroups4 = 1, kGroups8 = 1;

typedef float F __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

inline F broadcast(float x) { return F{x, x, x, x}; }
inline F load(const float* p) { F r; memcpy(&r, p, sizeof r); return r; }
inline void store(float* p, F x) { memcpy(p, &x, sizeof x); }
inline F add(F a, F b) { return a + b; }
inline F larger(F a, F b) { return a > b ? a : b; }  // b where either is NaN
inline F multiply(F a, F b) { return a * b; }
inline F fma(F a, F b, F c) { return a * b + c; }
// Rounded once, as other instruction sets do it: where a result must have the same bits everywhere.
inline F fused(F a, F b, F c) {
  for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}

inline U load_lanes(const uint8_t* p) { U r; memcpy(&r, p, sizeof r); return r; }
// Bytes, one a lane.
inline U load_bytes(const uint8_t* p) { return U{p[0], p[1], p[2], p[3]}; }
inline U combine(U a, U b) { return a | b; }
inline void store_lanes(uint8_t* p, U a) { memcpy(p, &a, sizeof a); }
inline void keep(U&) {}
inline U repeat(uint32_t bits) { return U{} | bits; }
inline U mask(U a, U b) { return a & b; }
inline U mask(U a, uint32_t m) { return a & m; }
inline U select(uint32_t m, U low, U high) { return (low & m) | (high & ~m); }
inline U shift_right(U a, int n) { return a >> static_cast<uint32_t>(n); }
inline U shift_left(U a, int n) { return a << static_cast<uint32_t>(n); }
inline U flip(U a, uint32_t m) { return a ^ m; }
inline F convert(U a) { return __builtin_convertvector(reinterpret_cast<I>(a), F); }

inline F load_half(const uint16_t* p) {
  return F{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]), from_float16(p[3])};
}
inline F lookup16(F table, U) { return table; }  // never called: see kSumTables

// Levels of a code; bits of a lane above BITS are ignored.
template <int BITS>
struct Lookup {
  const float* table;
  explicit Lookup(const float* levels) : table(levels) {}
  F operator()(U index) const {
    const U at = index & ((1u << BITS) - 1);
    return F{table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
  }
};

}  // namespace
}  // namespace fewbit
