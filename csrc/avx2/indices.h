// SPDX-License-Identifier: Apache-2.0
// Indices of 8 to 16 bits as a dense string: one instruction each, from two words of 8 bytes.
#pragma once

#include <stdint.h>

#include "core/inline.h"

namespace fewbit {
namespace {

template <class T>
FEWBIT_INLINE T word_at(const void* p) {
  T word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
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
