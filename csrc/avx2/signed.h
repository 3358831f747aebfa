// SPDX-License-Identifier: Apache-2.0
// Products of signed bytes, which AVX2 has no instruction for: vpmaddubsw takes the magnitude of one and the other with
// the first one's sign. Levels count from 128 and are within +-127, so that a pair of products is at most 2 * 127 * 128,
// which int16 holds.
#pragma once

#include "avx2/simd.h"

namespace fewbit {
namespace {

constexpr int kRowsBeside = 2;
constexpr int kByteOrigin = 128;

// 16 levels in both halves of a register, as signed bytes.
struct Shuffle {
  U table;
  Shuffle() = default;
  explicit Shuffle(const uint8_t* bytes)
      : table(flip(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))), 0x80808080u)) {}
  inline U operator()(U index) const { return _mm256_shuffle_epi8(table, index); }
};

inline void totals_of(const U* sum, int32_t* out) {
  const U all = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), four);
}

inline U multiply_add(U sum, U level, U x) {
  const U pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(level, x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

}  // namespace
}  // namespace fewbit
