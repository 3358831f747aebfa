// SPDX-License-Identifier: Apache-2.0
// Indices of 8 to 16 bits as a dense string: one instruction each, from two words of 8 bytes. And the entries of 8 bytes that
// they mean.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "core/inline.h"
#include "core/word.h"

namespace fewbit {
namespace {

// Bytes that are fetched early, to the second-level cache and the first, which has little room beside a book.
constexpr int64_t kFar = 8 * 1024, kNear = 512;

FEWBIT_INLINE void fetch_early(const uint8_t* codes) {
  __builtin_prefetch(codes + kFar, 0, 2);
  __builtin_prefetch(codes + kNear, 0, 3);
}

// Two entries of 8 bytes, side by side.
FEWBIT_INLINE __m128i beside(const uint8_t* first, const uint8_t* second) {
  const __m128 low = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first)));
  return _mm_castps_si128(_mm_loadh_pi(low, reinterpret_cast<const __m64*>(second)));
}

// A register's, whatever the compiler knows of it: bextr has its field in no constant.
FEWBIT_INLINE uint64_t in_register(uint64_t x) {
  asm("" : "+r"(x));
  return x;
}
// Bits of `word`: as many as bits 8 to 15 of `field` say, from that on which bits 0 to 7 say.
FEWBIT_INLINE uint64_t extract(uint64_t word, uint64_t field) {
  uint64_t found;
  asm("bextr %2, %1, %0" : "=r"(found) : "r"(word), "r"(field) : "cc");
  return found;
}

// Reads the indices of eight columns, which are `size()` bytes. BITS: known beforehand, or 0.
template <int BITS>
struct EightIndices {
  int64_t bits;
  uint64_t low[3], high[3];  // of the first word of 8 bytes, indices 1, 2, 3; of the last one, indices 4, 5, 6

  explicit FEWBIT_INLINE EightIndices(int64_t own) : bits(BITS ? BITS : own) {
    for (int i = 0; i < 3; i++) {
      low[i] = in_register(static_cast<uint64_t>((i + 1) * bits | bits << 8));
      high[i] = in_register(static_cast<uint64_t>((64 - (4 - i) * bits) | bits << 8));
    }
  }

  FEWBIT_INLINE int64_t size() const { return BITS ? BITS : bits; }
  // Columns 0 to 3, and 4 to 7: apart, as all of them would take too many registers.
  FEWBIT_INLINE void first(const uint8_t* codes, uint64_t (&at)[4]) const {
    const uint64_t word = in_register(word_at<uint64_t>(codes));
    for (int i = 0; i < 3; i++) at[i + 1] = extract(word, low[i]);
    at[0] = word & ((uint64_t{1} << size()) - 1);
  }
  FEWBIT_INLINE void last(const uint8_t* codes, uint64_t (&at)[4]) const {
    const uint64_t word = in_register(word_at<uint64_t>(codes + size() - 8));
    for (int i = 0; i < 3; i++) at[i] = extract(word, high[i]);
    at[3] = word >> (64 - size());
  }
};

}  // namespace
}  // namespace fewbit
