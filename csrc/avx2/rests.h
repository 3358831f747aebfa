// SPDX-License-Identifier: Apache-2.0
// Activations that sums of int16 have no room for: they are few, taken out of their rows and multiplied by themselves.
#pragma once

#include "avx2/simd.h"

#include "core/inline.h"
#include "core/kernel.h"

namespace fewbit {
namespace {

// Those of a row of activations, in groups of four columns.
class Rests {
 public:
  static constexpr int64_t kWords = 10;  // int32s of a chunk

  FEWBIT_INLINE Rests(const SegmentTask& task, int64_t row)
      : x_(task.rests + row * task.chunks * kWords), some_(reinterpret_cast<uint8_t*>(x_ + task.chunks * 8)) {}

  // Those of a chunk, zeros where `none` is set.
  FEWBIT_INLINE void put(int64_t chunk, U x, U none) const {
    store_lanes(reinterpret_cast<uint8_t*>(x_ + chunk * 8), _mm256_andnot_si256(none, x));
    some_[chunk] = static_cast<uint8_t>(~_mm256_movemask_ps(_mm256_castsi256_ps(none)));
  }

  // Calls each(x, codes) for the groups there are in `chunks` chunks from `first`, whose codes lie `apart` bytes apart.
  template <class Each>
  FEWBIT_INLINE void visit(int64_t first, int64_t chunks, const uint8_t* codes, int64_t apart, const Each& each) const {
    for (; chunks > 0; chunks -= 8, first += 8, codes += 64 * apart) {
      uint64_t some;
      __builtin_memcpy(&some, some_ + first, sizeof some);
      if (chunks < 8) some &= (uint64_t{1} << 8 * chunks) - 1;
      for (; some; some &= some - 1) {
        const int g = __builtin_ctzll(some);
        each(repeat(static_cast<uint32_t>(x_[first * 8 + g])), codes + g * apart);
      }
    }
  }

 private:
  int32_t* x_;     // (chunks, 8)
  uint8_t* some_;  // (chunks): a bit for each group that there is; padded to a multiple of 8 and read by 8
};

// Half of each signed byte, rounded up.
FEWBIT_INLINE U half_of(U x) {
  constexpr uint32_t kSigns = 0x80808080u;
  return flip(_mm256_avg_epu8(flip(x, kSigns), repeat(kSigns)), kSigns);
}

}  // namespace
}  // namespace fewbit
