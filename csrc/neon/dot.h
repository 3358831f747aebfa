// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "neon/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kDirect2 = 4, kDirect4 = 0, kDirect8 = 0, kDirectChains = 1, kAlone = 0, kAlone2 = 0, kMany = 2, kManyTokens = 4;
constexpr int direct1(int) { return 4; }
constexpr int planes(int) { return 1; }
constexpr bool kInPlace = false;
constexpr bool kFew = false;
constexpr int kSums = 0, kUnrollMany = 1;

// Signed products of bytes, summed in pairs: codes of 8 bits are shifted down by 128 first. -128 * -128 twice does not
// fit an int16, so pairs are widened before they are summed.
template <int BITS>
struct Dot {
  static constexpr int kGroups = 8;
  static constexpr float kOrigin = BITS == 8 ? 128 : 0;
  int32x4_t sum = vdupq_n_s32(0);

  inline void add(U u, const int8_t* x) {
    int32_t lane;
    __builtin_memcpy(&lane, x, sizeof lane);
    const int8x16_t a = vreinterpretq_s8_u32(BITS == 8 ? flip(u, 0x80808080u) : u);
    const int8x8_t b = vreinterpret_s8_s32(vdup_n_s32(lane));
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), b)), high = vpaddlq_s16(vmull_s8(vget_high_s8(a), b));
    sum = vaddq_s32(sum, vpaddq_s32(low, high));
  }
  inline void begin(F start) { sum = vaddq_s32(sum, vcvtq_s32_f32(start)); }
  inline void flush() {}
  inline F value() const { return vcvtq_f32_s32(sum); }
};

}  // namespace
}  // namespace fewbit

#include "core/words.h"
