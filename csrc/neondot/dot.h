// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "neon/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kDirect2 = 4, kDirect4 = 0, kDirect8 = 0, kDirectChains = 2, kAlone = 0, kAlone2 = 0, kMany = 4, kManyTokens = 4;
constexpr int kDigits1 = 4, kDigits2 = 2, kAloneDigits = 0, kManyDigits = 2;
constexpr int direct1(int) { return 4; }
constexpr int planes(int) { return 1; }
constexpr bool kInPlace = false;
constexpr int kSums = 0;
constexpr int kByteOrigin = 128;

inline U load_apart(const uint8_t* p, int64_t) { return load_lanes(p); }
inline U plus(U a, U b) { return vaddq_u32(a, b); }
inline int32_t total_of(U a) { return vaddvq_s32(vreinterpretq_s32_u32(a)); }

// Four products of signed bytes, those of u being shifted down by 128 first.
inline U multiply_add(U sum, U u, U x) {
  const int8x16_t a = vreinterpretq_s8_u32(flip(u, 0x80808080u));
  return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(sum), a, vreinterpretq_s8_u32(x)));
}

// sdot adds four signed products of bytes to an int32: codes of 8 bits are shifted down by 128 first.
template <int BITS>
struct Dot {
  static constexpr int kGroups = 8;
  static constexpr float kOrigin = BITS == 8 ? 128 : 0;
  int32x4_t sum = vdupq_n_s32(0);

  inline void add(U u, const int8_t* x) {
    int32_t lane;
    __builtin_memcpy(&lane, x, sizeof lane);
    const U a = BITS == 8 ? flip(u, 0x80808080u) : u;
    sum = vdotq_s32(sum, vreinterpretq_s8_u32(a), vreinterpretq_s8_s32(vdupq_n_s32(lane)));
  }
  inline void flush() {}
  inline void merge(const Dot& other, int) { sum = vaddq_s32(sum, other.sum); }
  inline F value() const { return vcvtq_f32_s32(sum); }
};

}  // namespace
}  // namespace fewbit

#include "core/words.h"
