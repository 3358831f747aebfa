// SPDX-License-Identifier: Apache-2.0
// The vector type of the portable kernels: 16 plain floats, for any compiler and processor.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fewbit {
namespace {

constexpr int kLanes = 16;
constexpr bool kSumTables = false;
constexpr int kGroups1 = 1, kGroups2 = 1, kGroups4 = 1;  // row groups beside 1, 2 and 4 tokens

struct F { float at[16]; };
struct U { uint32_t at[16]; };

#define FEWBIT_LANES for (int i = 0; i < 16; i++)

inline F broadcast(float x) { F r; FEWBIT_LANES r.at[i] = x; return r; }
inline F load(const float* p) { F r; memcpy(&r, p, sizeof r); return r; }
inline void store(float* p, F x) { memcpy(p, &x, sizeof x); }
inline F add(F a, F b) { FEWBIT_LANES a.at[i] += b.at[i]; return a; }
inline F multiply(F a, F b) { FEWBIT_LANES a.at[i] *= b.at[i]; return a; }
inline F fma(F a, F b, F c) { FEWBIT_LANES c.at[i] += a.at[i] * b.at[i]; return c; }

inline U load_lanes(const uint8_t* p) { U r; memcpy(&r, p, sizeof r); return r; }
inline U mask(U a, uint32_t m) { FEWBIT_LANES a.at[i] &= m; return a; }
inline U select(uint32_t m, U low, U high) { FEWBIT_LANES low.at[i] = (low.at[i] & m) | (high.at[i] & ~m); return low; }
inline U shift_right(U a, int n) { FEWBIT_LANES a.at[i] >>= n; return a; }
inline U shift_left(U a, int n) { FEWBIT_LANES a.at[i] <<= n; return a; }
inline F convert(U a) { F r; FEWBIT_LANES r.at[i] = static_cast<float>(static_cast<int32_t>(a.at[i])); return r; }

// IEEE float16 to float32, exact: the exponent is moved by a multiplication, which also handles subnormals.
inline F load_half(const uint16_t* p) {
  F r;
  FEWBIT_LANES {
    uint16_t half;
    memcpy(&half, p + i, sizeof half);
    const uint32_t magnitude = half & 0x7fffu;
    uint32_t bits = magnitude << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    memcpy(&bits, &value, sizeof bits);
    if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
    bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
    memcpy(&r.at[i], &bits, sizeof bits);
  }
  return r;
}

inline F lookup16(F table, U index) { F r; FEWBIT_LANES r.at[i] = table.at[index.at[i] & 15]; return r; }

// Levels of a code; bits of a lane above BITS are ignored.
template <int BITS>
struct Lookup {
  const float* table;
  explicit Lookup(const float* levels) : table(levels) {}
  F operator()(U index) const { F r; FEWBIT_LANES r.at[i] = table[index.at[i] & ((1u << BITS) - 1)]; return r; }
};

}  // namespace
}  // namespace fewbit
