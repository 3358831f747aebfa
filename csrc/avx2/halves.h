// SPDX-License-Identifier: Apache-2.0
// Codes of 3 bits in halves16 (see fewbit.h): one mask and one shift for two of them, where parts of 2 and 1 bits take six.
#pragma once

#include "avx2/dot.h"

#include "core/segments.h"

namespace fewbit {
namespace {

// Codes of K that lie so.
template <class K>
struct InHalves : K {
  static constexpr bool kHalves = true;
  using K::K;
};

template <>
struct Held<3, true> {
  U part, rest;  // what holds columns 4g .. 4g+3; of the two last groups, what the vectors up to this one hold

  FEWBIT_INLINE void advance(const uint8_t* codes, int g) {
    if (g == 6) part = rest;
    if (g % 2 || g == 6) return;
    part = load_lanes(codes + g / 2 * 64);
    const U high = mask(part, 0x88888888u);
    // Averages are shifts that keep within their bytes, and combine.
    rest = _mm256_avg_epu8(high, g ? rest : repeat(0));
  }

  FEWBIT_INLINE void flip_new(uint32_t bits, int g) {
    if (g % 2 == 0) part = flip(part, bits);
  }

  FEWBIT_INLINE U quad(int g) const { return mask(g % 2 ? shift_right(part, 4) : part, 0x07070707u); }

  // The same with anything in bits 3 to 6, in order.
  FEWBIT_INLINE U index(int g) {
    if (g % 2) return shift_right(part, 4);
    if (g < 6) part = mask(part, 0x77777777u);
    return part;
  }
};

template <>
FEWBIT_INLINE U quad_at<3, true>(const uint8_t* codes, int g) {
  if (g < 6) return mask(shift_right(load_lanes(codes + g / 2 * 64), g % 2 * 4), 0x07070707u);
  U code = repeat(0);
  for (int v = 0; v < 3; v++)
    code = combine(code, shift_left(mask(shift_right(load_lanes(codes + v * 64), g * 4 - 21), 0x01010101u), v));
  return code;
}

}  // namespace
}  // namespace fewbit
