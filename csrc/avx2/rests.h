// SPDX-License-Identifier: Apache-2.0
// Activations that sums of int16 have no room for: they are few, taken out of their rows and multiplied by themselves.
#pragma once

#include "avx2/simd.h"

#include "core/inline.h"
#include "core/kernel.h"

namespace fewbit {
namespace {

// Those of a row of activations and of the rows behind it, of kTogether in all that are computed together, in groups of four
// columns. They lie as activations do; where nothing is left out, nothing is written.
template <int kTogether>
class Rests {
 public:
  static constexpr int64_t kWords = 19;  // int32s of a chunk

  FEWBIT_INLINE Rests(const SegmentTask& task, int64_t row) : list_words_(task.chunks * 10) {
    const int64_t here = row % kTogether;
    int32_t* first = task.rests + (row - here) * task.chunks * kWords;
    x_ = reinterpret_cast<int8_t*>(first) + here * 32;
    some_ = reinterpret_cast<int8_t*>(first + kTogether * task.chunks * 8) + here;
    list_ = first + kTogether * task.chunks * 9 + here * list_words_;
  }

  // Those of a row, chunk after chunk: a chunk's, none where `none` is set; and what is to be known of the row.
  class Writer {
   public:
    FEWBIT_INLINE Writer(const Rests& rests) : rests_(rests), next_(rests.list_ + 1) {}

    FEWBIT_INLINE void put(int64_t chunk, U x, U none) {
      uint32_t some = ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(none))) & 255;
      rests_.some_[chunk * kTogether] = static_cast<int8_t>(some);
      if (some == 0) return;
      store_lanes(reinterpret_cast<uint8_t*>(rests_.x_ + chunk * kTogether * 32), x);
      for (; some; some &= some - 1) *next_++ = static_cast<int32_t>(chunk * 8 + __builtin_ctz(some));
    }

    FEWBIT_INLINE void finish(bool mark) { rests_.list_[0] = mark, *next_ = INT32_MAX; }

   private:
    const Rests& rests_;
    int32_t* next_;
  };

  FEWBIT_INLINE bool mark() const { return list_[0] != 0; }

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

  // Calls each(h, at, x) for each group that one of H rows has in `chunks` chunks from `first`, `at` counted from there: by what was
  // listed, so that no branch depends on where they are.
  template <int H, class Each>
  FEWBIT_INLINE void each_listed(int64_t first, int64_t chunks, const Each& each) const {
    const int64_t begin = first * 8, end = begin + chunks * 8;
    for (int h = 0; h < H; h++) {
      const int32_t* next = list_ + h * list_words_ + 1;
      while (*next < begin) next++;
      for (; *next < end; next++) each(h, *next - begin, x_at(*next, h));
    }
  }

 private:
  FEWBIT_INLINE const int8_t* x_at(int64_t group, int h) const { return x_ + (group / 8 * kTogether + h) * 32 + group % 8 * 4; }

  int8_t* x_;     // (chunks, rows, 32)
  int8_t* some_;  // (chunks, rows): a bit for each group that there is
  int32_t* list_; // (rows, 10 chunks): the mark, each group, a number above all of these
  int64_t list_words_;
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
