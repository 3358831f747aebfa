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

// A group of four columns that is left out of a row: its halves; and what a byte u is less by, times both: pairs of 16 bits. Two
// products of u, less that, fit those.
struct LeftOut {
  int32_t group, half, other, less;
};

// A group of which pairs are halved: the other halves.
struct Halved {
  int32_t group, half;
};

// What is kept of a row of activations, beside those of others of kTogether in all that are computed together. As sums of spans
// take it, it stands among the activations, and the groups that are left out there, unless they are too many, are listed here.
// As sums of pairs take it, it stands here, with the halves that it lacks.
template <int kTogether>
struct SplitRow {
  static constexpr int64_t kMost = 8;                                      // one of as many groups is left out
  static constexpr int64_t kListed = 2 * 8 / kMost, kHalved = 8;           // of a chunk, at most
  static constexpr int64_t kWords = 8 + 2 * 2 + kListed * 4 + kHalved * 2;  // int32s of a chunk: what is below

  int8_t* pairs;                           // (chunks, rows, 32)
  int32_t *groups_before, *halves_before;  // (chunks + 1, rows): of those listed; of all groups -1 where they are too many
  LeftOut* groups;                         // (rows, chunks * kListed): of two entries where both of a pair are -128
  Halved* halves;                          // (rows, chunks * kHalved)

  FEWBIT_INLINE SplitRow(const SegmentTask& task, int64_t row) {
    const int64_t here = row % kTogether, chunks = task.chunks;
    int32_t* next = task.rests + (row - here) * chunks * kWords;
    const auto take = [&](int64_t words) { return next += words, next - words; };
    pairs = reinterpret_cast<int8_t*>(take(chunks * kTogether * 8)) + here * 32;
    groups_before = take((chunks + 1) * kTogether) + here, halves_before = take((chunks + 1) * kTogether) + here;
    groups = reinterpret_cast<LeftOut*>(take(chunks * kTogether * kListed * 4)) + here * chunks * kListed;
    halves = reinterpret_cast<Halved*>(next) + here * chunks * kHalved;
  }

  // Activations of a row that is the first of kTogether, and of the rows behind it.
  static FEWBIT_INLINE int8_t* of_pairs(const SegmentTask& task, int64_t row) {
    return reinterpret_cast<int8_t*>(task.rests + row * task.chunks * kWords);
  }

  FEWBIT_INLINE int64_t groups_at(int64_t chunk) const { return groups_before[chunk * kTogether]; }
  FEWBIT_INLINE int64_t halves_at(int64_t chunk) const { return halves_before[chunk * kTogether]; }
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
