// SPDX-License-Identifier: Apache-2.0
// Activations that sums of int16 have no room for: they are few, taken out of their rows and multiplied by themselves.
#pragma once

#include "avx2/simd.h"

#include "core/inline.h"
#include "core/kernel.h"

namespace fewbit {
namespace {

// Half of each signed byte, rounded up.
FEWBIT_INLINE U half_of(U x) {
  constexpr uint32_t kSigns = 0x80808080u;
  return flip(_mm256_avg_epu8(flip(x, kSigns), repeat(kSigns)), kSigns);
}

// One of a row: its place, in groups of four columns; its halves; and what a byte u is less by, times both: pairs of 16 bits.
// Two products of u, less that, fit those.
struct LeftOut {
  int32_t group, half, other, less;
};

// Those of a row of activations and of the rows behind it, of kTogether in all that are computed together, in groups of four
// columns. They lie as activations do; where nothing is left out, nothing is written.
template <int kTogether>
class Rests {
 public:
  static constexpr int64_t kListed = 17;                                                 // of a chunk
  static constexpr int64_t kWords = 9 + kListed * static_cast<int64_t>(sizeof(LeftOut) / 4);  // int32s of one

  FEWBIT_INLINE Rests(const SegmentTask& task, int64_t row) : listed_(task.chunks * kListed) {
    const int64_t here = row % kTogether;
    int32_t* first = task.rests + (row - here) * task.chunks * kWords;
    x_ = reinterpret_cast<int8_t*>(first) + here * 32;
    some_ = reinterpret_cast<int8_t*>(first + kTogether * task.chunks * 8) + here;
    list_ = reinterpret_cast<LeftOut*>(first + kTogether * task.chunks * 9) + here * listed_;
  }

  // Those of a row, chunk after chunk: a chunk's, none where `none` is set; and what is to be known of the row. CENTRE: what
  // bytes are less by.
  template <int CENTRE>
  class Writer {
   public:
    explicit FEWBIT_INLINE Writer(const Rests& rests) : rests_(rests), next_(rests.list_) {}

    FEWBIT_INLINE void put(int64_t chunk, U x, U none) {
      uint32_t some = ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(none))) & 255;
      rests_.some_[chunk * kTogether] = static_cast<int8_t>(some);
      if (some == 0) return;
      store_lanes(reinterpret_cast<uint8_t*>(rests_.x_ + chunk * kTogether * 32), x);
      const U half = half_of(x), other = _mm256_sub_epi8(x, half), lowest = _mm256_set1_epi16(static_cast<int16_t>(0x8080));
      const U centre = _mm256_set1_epi8(static_cast<int8_t>(CENTRE));
      U both[5] = {half, other, _mm256_maddubs_epi16(centre, half), _mm256_maddubs_epi16(centre, other)};
      both[4] = _mm256_add_epi16(both[2], both[3]);
      int32_t words[5][8];
      for (int i = 0; i < 5; i++) store_lanes(reinterpret_cast<uint8_t*>(words[i]), both[i]);
      const uint32_t pairs = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi16(x, lowest)));
      for (; some; some &= some - 1) {
        const int g = __builtin_ctz(some), at = static_cast<int>(chunk * 8) + g;
        if (pairs >> g * 4 & 15) {  // two of -128
          *next_++ = {at, words[0][g], 0, words[2][g]};
          *next_++ = {at, words[1][g], 0, words[3][g]};
        } else {
          *next_++ = {at, words[0][g], words[1][g], words[4][g]};
        }
      }
    }

    FEWBIT_INLINE void finish(bool mark) { *next_ = {INT32_MAX, 0, 0, 0}, rests_.list_[rests_.listed_ - 1].half = mark; }

   private:
    const Rests& rests_;
    LeftOut* next_;
  };

  FEWBIT_INLINE bool mark() const { return list_[listed_ - 1].half != 0; }

  // Calls each(h, x, codes) for each group that one of H rows has in `chunks` chunks from `first`, whose codes lie `apart`
  // bytes apart. Most of the time there is none.
  template <int H, class Each>
  FEWBIT_INLINE void visit(int64_t first, int64_t chunks, const uint8_t* codes, int64_t apart, const Each& each) const {
    uint32_t any = 0;
    for (int64_t c = 0; c < chunks; c++) {
      uint32_t bits = 0;
      __builtin_memcpy(&bits, some_ + (first + c) * kTogether, H);
      any |= bits;
      asm("" : "+r"(any));  // GCC would make vectors of so few
    }
    if (__builtin_expect(any == 0, 1)) return;
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
      for (int64_t c = 0; c < chunks; c++)
        for (uint32_t left = static_cast<uint8_t>(some_[(first + c) * kTogether + h]); left; left &= left - 1) {
          const int g = __builtin_ctz(left);
          each(h, x_ + ((first + c) * kTogether + h) * 32 + g * 4, codes + (c * 8 + g) * apart);
        }
  }

  // Calls each(h, at, rest) for each that one of H rows has in `chunks` chunks from `first`, `at` counted from there: by what
  // was listed, so that no branch depends on where they are.
  template <int H, class Each>
  FEWBIT_INLINE void each_listed(int64_t first, int64_t chunks, const Each& each) const {
    const int64_t begin = first * 8, end = begin + chunks * 8;
    for (int h = 0; h < H; h++) {
      const LeftOut* next = list_ + h * listed_;
      while (next->group < begin) next++;
      for (; next->group < end; next++) each(h, next->group - begin, *next);
    }
  }

 private:
  int8_t* x_;     // (chunks, rows, 32)
  int8_t* some_;  // (chunks, rows): a bit for each group that there is
  LeftOut* list_;    // (rows, listed_): each, one beyond all groups, and at the very end the mark
  int64_t listed_;
};

// Which pairs, of 16 bits, have activations of one sign that add up to more than 128.
FEWBIT_INLINE U large_pairs(U x) {
  const U one = _mm256_set1_epi8(1), most = _mm256_set1_epi16(128), below = _mm256_cmpgt_epi8(_mm256_setzero_si256(), x);
  const U minus = _mm256_and_si256(_mm256_abs_epi8(x), below), plus = _mm256_andnot_si256(below, x);
  return _mm256_or_si256(_mm256_cmpgt_epi16(_mm256_maddubs_epi16(plus, one), most),
                         _mm256_cmpgt_epi16(_mm256_maddubs_epi16(minus, one), most));
}

}  // namespace
}  // namespace fewbit
