// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "avx2/narrow.h"
#include "avx2/rounded_chunk.h"
#include "avx2/shuffle.h"
#include "avx2/simd.h"

#include "core/kernel.h"
#include "core/parts.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int kDirect2 = 2, kDirect4 = 0, kDirect8 = 0, kDirectChains = 1, kAlone = 0, kAlone2 = 0, kMany = 2, kManyTokens = 4;
constexpr int kDigits2 = 1, kAloneDigits = 0, kManyDigits = 0;
constexpr int direct1(int bits) { return part_count(bits) == 1 && bits < 8 ? 4 : 2; }  // what 16 registers hold
constexpr int digits1(int bits) { return bits == 3 ? 1 : 2; }
constexpr int planes(int bits) { return bits == 8 ? 2 : 1; }
constexpr bool kInPlace = false;
constexpr bool kFew = true;
constexpr int kSums = 0, kUnrollMany = 1;
constexpr int kLevelBits = 5;

constexpr int64_t kEndless = INT64_MAX;

inline U four(const int8_t* x) {
  int32_t lane;
  __builtin_memcpy(&lane, x, sizeof lane);
  return _mm256_set1_epi32(lane);
}

// vpmaddubsw sums pairs in int16, which would saturate past 2 * 127 * 128: codes of 8 bits are multiplied as nibbles, or by
// activations that leave room. Narrow sums are widened before kGroups * 2 * (2^bits - 1) * 128 exceeds 32767, or that of 8
// kChunks groups does.
template <int BITS>
struct Dot {
  using Narrow = NarrowSum<BITS>;
  static_assert(BITS <= 5, "wider codes are summed in 32 bits");
  static constexpr int kGroups = BITS <= 4 ? 8 : 4;
  static constexpr int64_t kChunks = BITS <= 4 ? 32767 / (8 * 2 * 128 * ((1 << BITS) - 1)) : kEndless;
  static constexpr float kOrigin = 0;
  U narrow = _mm256_setzero_si256(), wide = _mm256_setzero_si256();

  inline void add(U u, const int8_t* x) {
    narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(u, four(x)));
    asm("" : "+x"(narrow));  // GCC would delay the additions, and keep one of eight sums in memory for that
  }
  inline void begin(F start) { wide = _mm256_add_epi32(wide, _mm256_cvtps_epi32(start)); }
  inline void flush() {
    wide = _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    narrow = _mm256_setzero_si256();
  }
  inline F value() const { return _mm256_cvtepi32_ps(wide); }
};

// Sums of u * x for bytes u of up to 7 bits, or of 8 where activations of one sign in a pair add up to 128 at most.
struct PairsOfBytes {
  static constexpr int kGroups = 8, kOrigin = 0;
  static constexpr int64_t kChunks = kEndless;
  U wide = _mm256_setzero_si256();
  static_assert(255 * 128 <= 32767 && 127 * 256 <= 32767);

  inline void add(U u, const int8_t* x) { add_pairs(_mm256_maddubs_epi16(u, four(x))); }
  inline void add_pairs(U pairs) {
    wide = _mm256_add_epi32(wide, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    asm("" : "+x"(wide));
  }
  inline void begin(F start) { wide = _mm256_add_epi32(wide, _mm256_cvtps_epi32(start)); }
  inline void flush() {}
  inline F value() const { return _mm256_cvtepi32_ps(wide); }
};

template <>
struct Dot<6> : PairsOfBytes {
  using Narrow = NarrowSum<6>;
};
template <>
struct Dot<7> : PairsOfBytes {
  using Narrow = NarrowSum<7>;
};

// int16 levels times activations as int16, summed in pairs: each plane holds four columns of every other two
// rows, whose halves are added up at the end. Nothing overflows: 32767 * 128 * 256 columns < 2^31.
struct Words {
  static constexpr int kHighOrigin = 0, kBegins = -1;
  static constexpr float kOrigin = 0;
  using X = int16_t;

  struct Sum {
    using Narrow = NarrowWords;
    static constexpr int kGroups = 8;
    static constexpr int64_t kChunks = kEndless;
    U sum = _mm256_setzero_si256();

    inline void add(U u, const int16_t* x) {
      int64_t lanes;
      __builtin_memcpy(&lanes, x, sizeof lanes);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(u, _mm256_set1_epi64x(lanes)));
    }
    inline void flush() {}
  };

  static inline void split(U low, U high, U (&plane)[2]) {
    plane[0] = _mm256_unpacklo_epi8(low, high);
    plane[1] = _mm256_unpackhi_epi8(low, high);
  }
  static inline F value(const Sum (&dot)[2]) {
    return _mm256_cvtepi32_ps(_mm256_hadd_epi32(dot[0].sum, dot[1].sum));
  }
};

// Bits of the bytes that a task's activations are multiplied by.
inline int bits_beside(const SegmentTask& task) { return task.table ? kLevelBits : task.bits == 8 ? 4 : task.bits; }

// Rounds a token, and makes what sums of many begin with.
inline void round_begun(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  if (task.together == kManyTokens) begin_row(task, token, bits_beside(task));
}

}  // namespace
}  // namespace fewbit
