// SPDX-License-Identifier: Apache-2.0
// Codes of row16 as bytes, as many chunks side by side as a vector has 16 bytes. Included after an ISA's simd.h.
#pragma once

#include <string.h>

#include "core/inline.h"
#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kBytes = 4 * kLanes, kBeside = kBytes / 16;  // of a vector; chunks in it
constexpr int kPart = 16 * kRowChunks;  // bytes of a part of four chunks

template <int BITS>
struct ByteCells {
  static constexpr int kUnit = BITS == 3 ? 3 : 1;
  static constexpr int kFields = 8 * kUnit / BITS, kColumns = 16 * kFields;
  U part[kUnit];

  ByteCells() = default;
  explicit FEWBIT_INLINE ByteCells(const uint8_t* codes) {
    for (int p = 0; p < kUnit; p++) part[p] = load_lanes(codes + p * kPart);
  }

  // Codes of 16 columns of each chunk, one a byte.
  FEWBIT_INLINE U field(int n) const {
    constexpr uint32_t kMask = 0x01010101u * ((1u << BITS) - 1);
    const int bit = n * BITS, p = bit / 8, at = bit % 8;
    if (at + BITS <= 8) return mask(at ? shift_right(part[p], at) : part[p], kMask);
    const uint32_t low = 0x01010101u * ((1u << (8 - at)) - 1);
    return mask(select(low, shift_right(part[p], at), shift_left(part[p + (p + 1 < kUnit)], 8 - at)), kMask);
  }
};

// The end of R rows, whose last one to three chunks lie at `codes`, `rest` bytes each, as if they were four.
template <int BITS, int R>
struct LastChunks {
  static constexpr int kUnit = ByteCells<BITS>::kUnit;
  uint8_t bytes[R * kUnit * kPart] = {};

  FEWBIT_INLINE LastChunks(const uint8_t* codes, int64_t apart, int64_t rest) {
    for (int r = 0; r < R; r++)
      for (int p = 0; p < kUnit; p++)
        memcpy(bytes + (r * kUnit + p) * kPart, codes + r * apart + p * (rest / kUnit), static_cast<size_t>(rest / kUnit));
  }
};

}  // namespace
}  // namespace fewbit
