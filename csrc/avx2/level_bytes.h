// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "avx2/shuffle.h"

#include "core/inline.h"

namespace fewbit {
namespace {

// 16 floats, looked up byte by byte.
struct LevelBytes {
  U byte[4];  // in both halves

  LevelBytes() = default;
  explicit FEWBIT_INLINE LevelBytes(const float* level) {
    const U low = by_place(_mm256_castps_si256(load(level)));
    const U high = by_place(_mm256_castps_si256(load(level + 8)));
    const U a = _mm256_permute2x128_si256(low, high, 0x20), b = _mm256_permute2x128_si256(low, high, 0x31);
    const U first = _mm256_unpacklo_epi32(a, b), last = _mm256_unpackhi_epi32(a, b);
    byte[0] = _mm256_permute4x64_epi64(first, 0x88), byte[1] = _mm256_permute4x64_epi64(first, 0xdd);
    byte[2] = _mm256_permute4x64_epi64(last, 0x88), byte[3] = _mm256_permute4x64_epi64(last, 0xdd);
  }

  // Levels of codes, a byte each: vector i has those of bytes 4i .. 4i + 3 of either half.
  FEWBIT_INLINE void operator()(U codes, F (&out)[4]) const {
    U found[4];
    for (int b = 0; b < 4; b++) found[b] = _mm256_shuffle_epi8(byte[b], codes);
    const U low[2] = {_mm256_unpacklo_epi8(found[0], found[1]), _mm256_unpackhi_epi8(found[0], found[1])};
    const U high[2] = {_mm256_unpacklo_epi8(found[2], found[3]), _mm256_unpackhi_epi8(found[2], found[3])};
    for (int i = 0; i < 2; i++) {
      out[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
      out[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
    }
  }
};

}  // namespace
}  // namespace fewbit
