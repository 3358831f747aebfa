// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "avx2/simd.h"

namespace fewbit {
namespace {

// Bytes of a half sorted by their place in a lane: lane j becomes byte j of each.
inline U by_place(U lanes) {
  return _mm256_shuffle_epi8(
      lanes, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

// 16 bytes in both halves of a register; bit 7 of an index gives 0.
struct Shuffle {
  U table;
  Shuffle() = default;
  explicit Shuffle(const uint8_t* bytes)
      : table(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))) {}
  inline U operator()(U index) const { return _mm256_shuffle_epi8(table, index); }
  inline U within(U index) const { return (*this)(_mm256_adds_epu8(index, _mm256_set1_epi8(0x70))); }
};

}  // namespace
}  // namespace fewbit
