// SPDX-License-Identifier: Apache-2.0
// Indices of 4 to 8 bits as bytes, from the chunks of vector16 (see fewbit_byte_vectors). Included after an ISA's simd.h.
#pragma once

#include "core/segments.h"

namespace fewbit {
namespace {

constexpr int64_t kAhead = 12 * 1024;  // bytes that are fetched early: no processor foresees the order within a chunk

// The indices of columns 4g .. 4g+3 in the low 6 bits of every byte; above them may be anything.
FEWBIT_INLINE U six_bits(const uint8_t* codes, int g) {
  if (g < 6) return load_lanes(codes + g * 64);
  const uint8_t* first = codes + (g - 6) * 192;
  const U low = shift_right(load_lanes(first), 6), high = shift_right(load_lanes(first + 128), 2);
  return select(0x0f0f0f0fu, select(0x03030303u, low, shift_right(load_lanes(first + 64), 4)), high);
}

// Calls `put(at, g, bytes)` with the indices of a chunk, which another lies kAhead behind: bytes [at, at + 4 kLanes) of group
// g of columns, those of 6 bits with anything above them.
template <int BITS, class Put>
FEWBIT_INLINE void decode(const uint8_t* codes, Put put) {
  prefetch<BITS>(codes + kAhead);
  for (int at = 0; at < 64; at += 4 * kLanes) {
    Held<BITS> held;
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
      if constexpr (BITS != 6) held.advance(codes + at, g);
      put(at, g, BITS == 6 ? six_bits(codes + at, g) : held.quad(g));
    }
  }
}

template <int BITS>
FEWBIT_INLINE void decode(const uint8_t* codes, uint8_t (*out)[64]) {
  decode<BITS>(codes, [&](int at, int g, U bytes) { store_lanes(out[g] + at, bytes); });
}

FEWBIT_INLINE void decode(int32_t bits, const uint8_t* codes, uint8_t (*out)[64]) {
  switch (bits) {
    case 4: return decode<4>(codes, out);
    case 5: return decode<5>(codes, out);
    case 6: return decode<6>(codes, out);
    case 7: return decode<7>(codes, out);
    default: return decode<8>(codes, out);
  }
}

}  // namespace
}  // namespace fewbit
