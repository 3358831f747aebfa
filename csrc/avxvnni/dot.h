// SPDX-License-Identifier: Apache-2.0
// AVX-VNNI: what AVX-512 VNNI does, in the registers of AVX2.
#pragma once

#include "avx2/shuffle.h"
#include "avx2/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kDirect2 = 2, kDirect4 = 2, kDirect8 = 0, kDirectChains = 2, kAlone = 0, kAlone2 = 0, kMany = 2, kManyTokens = 4;
constexpr int kDigits2 = 1, kAloneDigits = 0, kManyDigits = 1;
constexpr int direct1(int) { return 4; }
constexpr int digits1(int) { return 2; }
constexpr int planes(int) { return 1; }
constexpr bool kInPlace = true;
constexpr bool kFew = false;
constexpr int kSums = 8, kUnrollMany = 1;
constexpr int kRowsBeside = 2;
constexpr int kByteOrigin = 0;

inline void totals_of(const U* sum, int32_t* out) {
  const U all = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), four);
}

// See avx512vnni/dot.h.
inline U multiply_add(U sum, U u, U x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(x));
  return sum;
}

template <int BITS>
struct Dot {
  static constexpr int kGroups = 8;
  static constexpr float kOrigin = 0;
  U sum = _mm256_setzero_si256();

  inline void add(U u, const int8_t* x) {
    int32_t lane;
    __builtin_memcpy(&lane, x, sizeof lane);
    sum = multiply_add(sum, u, _mm256_set1_epi32(lane));
  }
  inline void add_once(U u, const int8_t* x) { add(u, x); }
  inline void begin(F start) { sum = _mm256_add_epi32(sum, _mm256_cvtps_epi32(start)); }
  inline void flush() {}
  inline void merge(const Dot& other, int bits) { sum = _mm256_add_epi32(sum, _mm256_srai_epi32(other.sum, bits)); }
  inline F value() const { return _mm256_cvtepi32_ps(sum); }
};

}  // namespace
}  // namespace fewbit

#include "core/words.h"
