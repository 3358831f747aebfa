// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "avx512/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

// 16 sums for many tokens, beside 2 vectors of codes, in 32 registers; 8 sums hide the latency for one token, and nearly do
// by 4.
constexpr int kDirect2 = 4, kDirect4 = 4, kDirect8 = 2, kDirectChains = 2, kAlone = 4, kAlone2 = 2, kMany = 2, kManyTokens = 8;
constexpr int kDigits2 = 2, kAloneDigits = 2, kManyDigits = 2;
constexpr int direct1(int) { return 4; }
constexpr int digits1(int) { return 4; }
constexpr int planes(int) { return 1; }
constexpr bool kInPlace = true;
constexpr bool kFew = false;
constexpr int kSums = 16, kUnrollMany = 8;
constexpr int kRowsBeside = 4;
constexpr int kByteOrigin = 0;

// Sums over all lanes of four vectors.
inline void totals_of(const U* sum, int32_t* out) {
  const auto half = [&](int i) {
    return _mm256_add_epi32(_mm512_castsi512_si256(sum[i]), _mm512_extracti64x4_epi64(sum[i], 1));
  };
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(half(0), half(1)), _mm256_hadd_epi32(half(2), half(3)));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), four);
}

// vpdpbusd: adds four products of bytes to an int32, without an intermediate sum that could saturate. Not by its intrinsic,
// for which GCC 12 copies every sum to another register and back, and runs out of registers.
inline U multiply_add(U sum, U u, U x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
  return sum;
}

template <int BITS>
struct Dot {
  static constexpr int kGroups = 8;
  static constexpr float kOrigin = 0;
  U sum = _mm512_setzero_si512();

  inline void add(U u, const int8_t* x) {
    int32_t lane;
    __builtin_memcpy(&lane, x, sizeof lane);
    sum = multiply_add(sum, u, _mm512_set1_epi32(lane));
  }
  inline void add_once(U u, const int8_t* x) {
    typedef int32_t Lane __attribute__((may_alias));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*reinterpret_cast<const Lane*>(x)));
  }
  inline void begin(F start) { sum = _mm512_add_epi32(sum, _mm512_cvtps_epi32(start)); }
  inline void flush() {}
  inline void merge(const Dot& other, int bits) { sum = _mm512_add_epi32(sum, _mm512_srai_epi32(other.sum, bits)); }
  inline F value() const { return _mm512_cvtepi32_ps(sum); }
};

// 16 bytes in every quarter of a register; bit 7 of an index gives 0.
struct Shuffle {
  U table;
  Shuffle() = default;
  explicit Shuffle(const uint8_t* bytes)
      : table(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))) {}
  inline U operator()(U index) const { return _mm512_shuffle_epi8(table, index); }
  inline U within(U index) const { return (*this)(_mm512_adds_epu8(index, _mm512_set1_epi8(0x70))); }
};

}  // namespace
}  // namespace fewbit

#include "core/words.h"
