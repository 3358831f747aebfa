// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "neon/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kDirect2 = 4, kDirect4 = 0, kDirect8 = 0, kDirectChains = 2, kAlone = 0, kAlone2 = 0, kMany = 4, kManyTokens = 4;
constexpr int kDigits2 = 2, kAloneDigits = 0, kManyDigits = 2;
constexpr int direct1(int) { return 4; }
constexpr int digits1(int) { return 4; }
constexpr int planes(int) { return 1; }
constexpr bool kInPlace = false;
constexpr bool kFew = false;
constexpr int kSums = 0, kUnrollMany = 1;
constexpr int kRowsBeside = 4;
constexpr int kByteOrigin = 128;

inline void totals_of(const U* sum, int32_t* out) {
  const U all = vpaddq_u32(vpaddq_u32(sum[0], sum[1]), vpaddq_u32(sum[2], sum[3]));
  vst1q_s32(out, vreinterpretq_s32_u32(all));
}

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
  inline void begin(F start) { sum = vaddq_s32(sum, vcvtq_s32_f32(start)); }
  inline void flush() {}
  inline void merge(const Dot& other, int) { sum = vaddq_s32(sum, other.sum); }
  inline F value() const { return vcvtq_f32_s32(sum); }

#if defined(__ARM_FEATURE_MATMUL_INT8)
  // Eight columns of two rows a register.
  struct Rows {
    int8x16_t low, high;

    inline Rows() = default;
    inline Rows(U first, U second) {
      const U a = BITS == 8 ? flip(first, 0x80808080u) : first, b = BITS == 8 ? flip(second, 0x80808080u) : second;
      low = vreinterpretq_s8_u32(vzip1q_u32(a, b)), high = vreinterpretq_s8_u32(vzip2q_u32(a, b));
    }
  };

  // Sums of two tokens; smmla adds eight products to each of two rows x two tokens.
  struct Pair {
    int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);

    inline void add(const Rows& rows, const int8_t* x, const int8_t* next) {
      const int8x16_t both = vcombine_s8(vld1_s8(x), vld1_s8(next));
      low = vmmlaq_s32(low, rows.low, both), high = vmmlaq_s32(high, rows.high, both);
    }
    inline int32x4_t of(int token) const { return token ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high); }
  };
#endif
};

}  // namespace
}  // namespace fewbit

#include "core/words.h"
