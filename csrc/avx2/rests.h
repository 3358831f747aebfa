// SPDX-License-Identifier: Apache-2.0
// Activations that sums of int16 have no room for: they are few, taken out of their rows and multiplied by themselves.
#pragma once

#include "avx2/simd.h"

#include "core/inline.h"
#include "core/kernel.h"

namespace fewbit {
namespace {

// Those of a row of activations and of the rows behind it, of kTogether in all that are computed together, in groups of four
// columns. They lie as activations do.
template <int kTogether>
class Rests {
 public:
  static constexpr int64_t kWords = 10;  // int32s of a chunk

  FEWBIT_INLINE Rests(const SegmentTask& task, int64_t row) {
    const int64_t here = row % kTogether;
    auto* first = reinterpret_cast<int8_t*>(task.rests + (row - here) * task.chunks * kWords);
    x_ = first + here * 32, some_ = first + kTogether * task.chunks * 32 + here;
  }

  // Those of a chunk of the row, zeros where `none` is set.
  FEWBIT_INLINE void put(int64_t chunk, U x, U none) const {
    store_lanes(reinterpret_cast<uint8_t*>(x_ + chunk * kTogether * 32), _mm256_andnot_si256(none, x));
    some_[chunk * kTogether] = static_cast<int8_t>(~_mm256_movemask_ps(_mm256_castsi256_ps(none)));
  }

  // Calls each(h, x, codes) for each group that one of the B rows from h has, h being every B-th of H, in `chunks` chunks from
  // `first`, whose codes lie `apart` bytes apart. Most of the time no row has any.
  template <int H, int B, class Each>
  FEWBIT_INLINE void visit(int64_t first, int64_t chunks, const uint8_t* codes, int64_t apart, const Each& each) const {
    uint32_t any = 0;
    for (int64_t c = 0; c < chunks; c++) {
      any |= some<H>(first + c, 0);
      asm("" : "+r"(any));  // GCC would make vectors of so few
    }
    if (__builtin_expect(any == 0, 1)) return;
#pragma GCC unroll 4
    for (int h = 0; h < H; h += B)
      for (int64_t c = 0; c < chunks; c++) {
        uint32_t left = some<B>(first + c, h);
        for (int bits = 4 * B; bits >= 8; bits /= 2) left |= left >> bits;
        for (left &= 255; left; left &= left - 1) {
          const int g = __builtin_ctz(left);
          each(h, x_ + ((first + c) * kTogether + h) * 32 + g * 4, codes + (c * 8 + g) * apart);
        }
      }
  }

 private:
  // A byte for each of B rows from h.
  template <int B>
  FEWBIT_INLINE uint32_t some(int64_t chunk, int h) const {
    uint32_t bits = 0;
    __builtin_memcpy(&bits, some_ + chunk * kTogether + h, B);
    return bits;
  }

  int8_t* x_;     // (chunks, rows, 32)
  int8_t* some_;  // (chunks, rows): a bit for each group that there is
};

// Which pairs, of 16 bits, have activations of one sign that add up to more than 128.
FEWBIT_INLINE U large_pairs(U x) {
  const U one = _mm256_set1_epi8(1), most = _mm256_set1_epi16(128), below = _mm256_cmpgt_epi8(_mm256_setzero_si256(), x);
  const U minus = _mm256_and_si256(_mm256_abs_epi8(x), below), plus = _mm256_andnot_si256(below, x);
  return _mm256_or_si256(_mm256_cmpgt_epi16(_mm256_maddubs_epi16(plus, one), most),
                         _mm256_cmpgt_epi16(_mm256_maddubs_epi16(minus, one), most));
}

// Half of each signed byte, rounded up.
FEWBIT_INLINE U half_of(U x) {
  constexpr uint32_t kSigns = 0x80808080u;
  return flip(_mm256_avg_epu8(flip(x, kSigns), repeat(kSigns)), kSigns);
}

}  // namespace
}  // namespace fewbit
