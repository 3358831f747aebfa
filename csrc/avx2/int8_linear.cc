// SPDX-License-Identifier: Apache-2.0
#include "avx2/simd.h"

#include "core/kernel.h"
#include "core/parts.h"

namespace fewbit {
namespace {

constexpr int kDirect2 = 2, kDirect4 = 1, kDirect8 = 0, kDirectChains = 1, kManyTokens = 4;
constexpr bool kInPlace = false;
constexpr int direct1(int bits) { return part_count(bits) == 1 && bits < 8 ? 4 : 2; }  // what 16 registers hold
constexpr int many(int) { return 2; }
constexpr int planes(int bits) { return bits == 8 ? 2 : 1; }

inline U four(const int8_t* x) {
  int32_t lane;
  __builtin_memcpy(&lane, x, sizeof lane);
  return _mm256_set1_epi32(lane);
}

// vpmaddubsw sums pairs in int16, which would saturate past 2 * 127 * 128: codes of 8 bits are multiplied as nibbles.
// Narrow sums are widened before kGroups * 2 * (2^bits - 1) * 128 exceeds 32767.
template <int BITS>
struct Dot {
  static constexpr int kGroups = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
  static constexpr float kOrigin = 0;
  U narrow = _mm256_setzero_si256(), wide = _mm256_setzero_si256();

  inline void add(U u, const int8_t* x) { narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(u, four(x))); }
  inline void flush() {
    wide = _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    narrow = _mm256_setzero_si256();
  }
  inline F value() const { return _mm256_cvtepi32_ps(wide); }
};

template <>
struct Dot<8> {
  static constexpr int kGroups = 8;
  static constexpr float kOrigin = 0;
  Dot<4> low, high;

  inline void add(U u, const int8_t* x) {
    low.add(mask(u, 0x0f0f0f0fu), x);
    high.add(mask(shift_right(u, 4), 0x0f0f0f0fu), x);
  }
  inline void flush() { low.flush(), high.flush(); }
  inline F value() const { return _mm256_cvtepi32_ps(_mm256_add_epi32(low.wide, _mm256_slli_epi32(high.wide, 4))); }
};

}  // namespace
}  // namespace fewbit

#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {

const Int8Kernel int8_linear_avx2 = {kManyTokens, round_token, int8_run};

}  // namespace fewbit
