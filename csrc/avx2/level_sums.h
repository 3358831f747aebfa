// SPDX-License-Identifier: Apache-2.0
// Sums of bytes times int8 activations that stay in int16 for four groups of four columns, as activations are made to be small
// enough for that: 128 times the sum of their magnitudes fits. Few groups are not; those are left out, and multiplied by
// themselves. All others take two and a half instructions for 32 products, where products of int16 take four.
#pragma once

#include "avx2/dot.h"
#include "avx2/rests.h"

#include "core/rounding.h"

namespace fewbit {
namespace {

// Sums of (u - CENTRE) * x for bytes u and activations of which no pair's magnitudes exceed 128, those of a span 255.
template <int CENTRE>
struct LevelSum : NarrowSum<6> {
  static constexpr int kCentre = CENTRE;
  using Rests = fewbit::Rests<kManyTokens>;
  static_assert(kSpan == 4 && kStarts == 2 && CENTRE * 255 <= 32767 && 255 * 128 <= 32767);

  // Of halves, as 255 times those of a pair fits int16.
  template <int T, int H>
  static FEWBIT_INLINE void add_rest(U (&sum)[T][H], int h, const X* x, const uint8_t* codes) {
    const U here = four(x), half = half_of(here), other = _mm256_sub_epi8(here, half);
    const U centre = _mm256_set1_epi8(static_cast<int8_t>(CENTRE));
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const U u = load_lanes(codes + t * kLanes * 4);
      const U first = _mm256_maddubs_epi16(u, half), second = _mm256_maddubs_epi16(u, other);
      if constexpr (CENTRE < 128) {  // 127 times two of -128 fits
        const U less = _mm256_maddubs_epi16(centre, here);
        sum[t][h] = add(sum[t][h], widened(_mm256_sub_epi16(_mm256_add_epi16(first, second), less)));
      } else {
        sum[t][h] = add(sum[t][h], widened(_mm256_sub_epi16(first, _mm256_maddubs_epi16(centre, half))));
        sum[t][h] = add(sum[t][h], widened(_mm256_sub_epi16(second, _mm256_maddubs_epi16(centre, other))));
      }
    }
  }

  template <int T, int H>
  static FEWBIT_INLINE void add_listed(U (&sum)[T][H], int h, const LeftOut& rest, const uint8_t* codes) {
    const U half = _mm256_set1_epi32(rest.half), other = _mm256_set1_epi32(rest.other), less = _mm256_set1_epi32(rest.less);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const U u = load_lanes(codes + t * kLanes * 4);
      const U both = _mm256_add_epi16(_mm256_maddubs_epi16(u, half), _mm256_maddubs_epi16(u, other));
      sum[t][h] = add(sum[t][h], widened(_mm256_sub_epi16(both, less)));
    }
  }
};

// Sums of u * x of which no pair's magnitudes, of one sign, exceed 128. HALVED: nor those of a pair that is left out.
template <bool HALVED>
struct LevelPairs : PairSum {
  using Rests = fewbit::Rests<kManyTokens>;

  template <int T, int H>
  static FEWBIT_INLINE void add_rest(U (&sum)[T][H], int h, const X* x, const uint8_t* codes) {
    const U here = four(x), half = HALVED ? here : half_of(here), other = _mm256_sub_epi8(here, half);
    const U one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const U u = load_lanes(codes + t * kLanes * 4);
      sum[t][h] = add(sum[t][h], _mm256_madd_epi16(_mm256_maddubs_epi16(u, half), one));
      if constexpr (!HALVED) sum[t][h] = add(sum[t][h], _mm256_madd_epi16(_mm256_maddubs_epi16(u, other), one));
    }
  }

  template <int T, int H>
  static FEWBIT_INLINE void add_listed(U (&sum)[T][H], int h, const LeftOut& rest, const uint8_t* codes) {
    const U other = _mm256_set1_epi32(rest.other), one = _mm256_set1_epi16(1);
    const U half = HALVED ? _mm256_add_epi8(_mm256_set1_epi32(rest.half), other) : _mm256_set1_epi32(rest.half);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const U u = load_lanes(codes + t * kLanes * 4);
      sum[t][h] = add(sum[t][h], _mm256_madd_epi16(_mm256_maddubs_epi16(u, half), one));
      if constexpr (!HALVED) sum[t][h] = add(sum[t][h], _mm256_madd_epi16(_mm256_maddubs_epi16(u, other), one));
    }
  }
};

// What of a chunk is small enough for LevelSum, in groups of four columns.
FEWBIT_INLINE U kept_groups(U here) {
  const auto within = [=](U sums, int16_t most) {
    return _mm256_cmpeq_epi32(_mm256_cmpgt_epi16(sums, _mm256_set1_epi16(most)), repeat(0));
  };
  U pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(here), _mm256_set1_epi8(1));  // magnitudes of columns 0 and 1, of 2 and 3
  const U small = within(pairs, 128);
  pairs = mask(pairs, small);
  pairs = _mm256_add_epi16(pairs, _mm256_slli_si256(pairs, 4));
  pairs = _mm256_add_epi16(pairs, _mm256_slli_si256(pairs, 8));  // with the groups of the span before
  return mask(small, within(pairs, 255));
}

// Leaves out the groups of a rounded row that are too large, and makes what sums of the others begin with; or halves its large
// pairs, where those groups would be too many, and marks the row.
template <int CENTRE>
FEWBIT_INLINE void leave_out(const SegmentTask& task, int64_t row) {
  constexpr int64_t kMost = 8;  // one of as many groups
  using Sum = LevelSum<CENTRE>;
  const int64_t apart = task.together * 32;
  int8_t* const x = row_of<int8_t>(task, row);
  int32_t* starts = task.starts + (x - static_cast<int8_t*>(task.activations)) / 32 * Sum::kStarts;
  const typename Sum::Rests rests(task, row);
  typename Sum::Rests::template Writer<CENTRE> writer(rests);
  int64_t kept = 0;
  const auto at = [&](int64_t c) { return reinterpret_cast<uint8_t*>(x + c * apart); };
  for (int64_t c = 0; c < task.chunks; c++)
    kept += __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(kept_groups(load_lanes(at(c))))));
  const bool pairs = (task.chunks * 8 - kept) * kMost > task.chunks * 8;
  for (int64_t c = 0; c < task.chunks; c++, starts += task.together * Sum::kStarts) {
    const U here = load_lanes(at(c)), large = large_pairs(here), kept_here = kept_groups(here);
    const U rest = pairs ? mask(half_of(here), large) : _mm256_andnot_si256(kept_here, here);
    const U stays = _mm256_sub_epi8(here, rest);
    store_lanes(at(c), stays);
    writer.put(c, rest, pairs ? _mm256_cmpeq_epi32(large, repeat(0)) : kept_here);
    U sum = _mm256_maddubs_epi16(_mm256_set1_epi8(1), stays);
    sum = _mm256_add_epi16(sum, _mm256_srli_si256(sum, 8));
    sum = _mm256_add_epi16(sum, _mm256_srli_si256(sum, 4));
    sum = _mm256_mullo_epi16(sum, _mm256_set1_epi16(-CENTRE));
    starts[0] = _mm256_extract_epi32(sum, 0), starts[1] = _mm256_extract_epi32(sum, 4);
  }
  writer.finish(pairs);
}

// How many of `tokens` rows were marked. Sums of pairs take any row, halved ones those that were.
FEWBIT_INLINE int64_t marked_rows(const SegmentTask& task, int64_t tokens) {
  int64_t marked = 0;
  for (int64_t row = 0; row < tokens; row++) marked += Rests<kManyTokens>(task, row).mark();
  return marked;
}

}  // namespace
}  // namespace fewbit
