// SPDX-License-Identifier: Apache-2.0
// What 32 activations are rounded to, to which a scale of 11 bits brings no division: see core/quotient.h.
#pragma once

#include "avx2/simd.h"

#include "core/quotient.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

// Eight activations plus 128, beyond 0 .. 255 where they are to be clamped.
inline U round_lanes(const float* x, F scale, F inverse, F limit, F zero) {
  const F here = larger(_mm256_min_ps(load(x), limit), -limit);  // quotients are finite, and bits in order
  const F sum = add(add(quotient(here, scale, inverse), zero), broadcast(kRound));
  return _mm256_sub_epi32(_mm256_castps_si256(sum), _mm256_set1_epi32(kRoundBits + 128));
}

template <>
inline int32_t round_chunks<int8_t>(const float* x, float scale, float zero, int64_t chunks, int8_t* out, int64_t apart) {
  constexpr float kLeast = 0x1p-100f, kMost = 0x1p100f;
  const bool divides = bits_of(scale) & 0x1fffu || !(scale > kLeast && scale < kMost);
  const F by = broadcast(scale), inverse = broadcast(1.0f / scale), limit = broadcast(scale * 1024), raise = broadcast(zero);
  U sums = _mm256_setzero_si256();
  int32_t sum = 0;
  for (int64_t left = chunks; left > 0; left--, x += 32, out += apart) {
    if (divides) {
      sum += divide_chunk(x, scale, zero, out);
      continue;
    }
    const auto at = [&](int i) { return round_lanes(x + i * kLanes, by, inverse, limit, raise); };
    const U low = _mm256_packs_epi32(at(0), at(1)), high = _mm256_packs_epi32(at(2), at(3));
    const U sorted = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    store_lanes(reinterpret_cast<uint8_t*>(out), sorted);
    sums = _mm256_add_epi32(sums, _mm256_sad_epu8(flip(sorted, 0x80808080u), _mm256_setzero_si256()));
  }
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  const int32_t raised = _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_unpackhi_epi64(half, half)));
  return divides ? sum : raised - static_cast<int32_t>(chunks) * 32 * 128;
}

}  // namespace
}  // namespace fewbit
