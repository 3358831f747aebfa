// SPDX-License-Identifier: Apache-2.0
// Sums of bytes times int8 activations that stay in int16 for four groups of four columns, as activations are made to be small
// enough for that: 128 times the sum of their magnitudes fits. Few groups are not; those are left out, and multiplied by
// themselves. All others take two and a half instructions for 32 products, where products of int16 take four.
#pragma once

#include "avx2/dot.h"
#include "avx2/rests.h"

#include "core/rounding.h"
#include "core/spans.h"

namespace fewbit {
namespace {

using Split = SplitRow<kManyTokens>;

// Sums of (u - CENTRE) * x for bytes u and activations of which no pair's magnitudes exceed 128, those of a span 255.
template <int CENTRE>
struct LevelSum : NarrowSum<6> {
  using Rest = LeftOut;
  static constexpr int kCentre = CENTRE;
  static_assert(kSpan == 4 && kStarts == 2 && CENTRE * 255 <= 32767 && 255 * 128 <= 32767);

  static FEWBIT_INLINE RestLists<Rest> rests(const SegmentTask& task, int64_t row) {
    const Split split(task, row);
    return {split.groups, split.groups_before, task.chunks * Split::kListed, kManyTokens};
  }

  template <int T, int H>
  static FEWBIT_INLINE void add_rest(U (&sum)[T][H], int h, const Rest& rest, const uint8_t* codes) {
    const U half = _mm256_set1_epi32(rest.half), other = _mm256_set1_epi32(rest.other), less = _mm256_set1_epi32(rest.less);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const U u = load_lanes(codes + t * kLanes * 4);
      const U both = _mm256_add_epi16(_mm256_maddubs_epi16(u, half), _mm256_maddubs_epi16(u, other));
      sum[t][h] = add(sum[t][h], widened(_mm256_sub_epi16(both, less)));
    }
  }
};

// Sums of u * x of which no pair's magnitudes, of one sign, exceed 128.
struct LevelPairs : PairSum {
  using Rest = Halved;

  static FEWBIT_INLINE const X* activations(const SegmentTask& task, int64_t row) { return Split::of_pairs(task, row); }

  static FEWBIT_INLINE RestLists<Rest> rests(const SegmentTask& task, int64_t row) {
    const Split split(task, row);
    return {split.halves, split.halves_before, task.chunks * Split::kHalved, kManyTokens};
  }

  template <int T, int H>
  static FEWBIT_INLINE void add_rest(U (&sum)[T][H], int h, const Rest& rest, const uint8_t* codes) {
    const U half = _mm256_set1_epi32(rest.half), one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
      sum[t][h] = add(sum[t][h], _mm256_madd_epi16(_mm256_maddubs_epi16(load_lanes(codes + t * kLanes * 4), half), one));
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

// Lists `group`, left out of a row; where both of a pair are -128, in two.
FEWBIT_INLINE LeftOut* put_group(LeftOut* next, int32_t group, const int32_t (&words)[5][8], bool in_two) {
  const int g = group % 8;
  if (in_two) {
    *next++ = {group, words[0][g], 0, words[2][g]};
    *next++ = {group, words[1][g], 0, words[3][g]};
  } else {
    *next++ = {group, words[0][g], words[1][g], words[4][g]};
  }
  return next;
}

// Lists the groups of a chunk `x` that are not kept.
template <int CENTRE>
FEWBIT_INLINE LeftOut* put_groups(LeftOut* next, int64_t chunk, U x, uint32_t some) {
  if (some == 0) return next;
  const U half = half_of(x), other = _mm256_sub_epi8(x, half), lowest = _mm256_set1_epi16(static_cast<int16_t>(0x8080));
  const U centre = _mm256_set1_epi8(static_cast<int8_t>(CENTRE));
  U both[5] = {half, other, _mm256_maddubs_epi16(centre, half), _mm256_maddubs_epi16(centre, other)};
  both[4] = _mm256_add_epi16(both[2], both[3]);
  int32_t words[5][8];
  for (int i = 0; i < 5; i++) store_lanes(reinterpret_cast<uint8_t*>(words[i]), both[i]);
  const uint32_t pairs = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi16(x, lowest)));
  for (; some; some &= some - 1) {
    const int g = __builtin_ctz(some);
    next = put_group(next, static_cast<int32_t>(chunk * 8) + g, words, pairs >> g * 4 & 15);
  }
  return next;
}

// Lists halves of a chunk's groups.
FEWBIT_INLINE Halved* put_halves(Halved* next, int64_t chunk, U half, uint32_t some) {
  if (some == 0) return next;
  int32_t words[8];
  store_lanes(reinterpret_cast<uint8_t*>(words), half);
  for (; some; some &= some - 1) {
    const int g = __builtin_ctz(some);
    *next++ = {static_cast<int32_t>(chunk * 8) + g, words[g]};
  }
  return next;
}

// Which groups of four columns are set.
FEWBIT_INLINE uint32_t groups_of(U groups) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(groups))); }

// Writes what spans begin with whose activations are x.
template <int CENTRE>
FEWBIT_INLINE void put_starts(int32_t* starts, U x) {
  U sum = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
  sum = _mm256_add_epi16(sum, _mm256_srli_si256(sum, 8));
  sum = _mm256_add_epi16(sum, _mm256_srli_si256(sum, 4));
  sum = _mm256_mullo_epi16(sum, _mm256_set1_epi16(-CENTRE));
  starts[0] = _mm256_extract_epi32(sum, 0), starts[1] = _mm256_extract_epi32(sum, 4);
}

// Splits a rounded row for sums of pairs, and where few groups are too large for spans, for these: see SplitRow.
template <int CENTRE>
FEWBIT_INLINE void split_row(const SegmentTask& task, int64_t row) {
  using Sum = LevelSum<CENTRE>;
  const int64_t apart = task.together * 32;
  int8_t* const x = row_of<int8_t>(task, row);
  int32_t* starts = task.starts + (x - static_cast<int8_t*>(task.activations)) / 32 * Sum::kStarts;
  const Split split(task, row);
  const auto at = [&](int8_t* from, int64_t c) { return reinterpret_cast<uint8_t*>(from + c * apart); };
  int64_t kept = 0;
  for (int64_t c = 0; c < task.chunks; c++) kept += __builtin_popcount(groups_of(kept_groups(load_lanes(at(x, c)))));
  const bool spans = (task.chunks * 8 - kept) * Split::kMost <= task.chunks * 8;
  LeftOut* group = split.groups;
  Halved* half = split.halves;
  for (int64_t c = 0; c < task.chunks; c++, starts += task.together * Sum::kStarts) {
    const U here = load_lanes(at(x, c)), large = large_pairs(here), halves = mask(half_of(here), large);
    store_lanes(at(split.pairs, c), _mm256_sub_epi8(here, halves));
    split.groups_before[c * kManyTokens] = static_cast<int32_t>(group - split.groups);
    split.halves_before[c * kManyTokens] = static_cast<int32_t>(half - split.halves);
    half = put_halves(half, c, halves, ~groups_of(_mm256_cmpeq_epi32(large, repeat(0))) & 255);
    if (!spans) continue;
    const U kept_here = kept_groups(here), stays = mask(here, kept_here);
    store_lanes(at(x, c), stays);
    group = put_groups<CENTRE>(group, c, _mm256_andnot_si256(kept_here, here), ~groups_of(kept_here) & 255);
    put_starts<CENTRE>(starts, stays);
  }
  split.groups_before[task.chunks * kManyTokens] = spans ? static_cast<int32_t>(group - split.groups) : -1;
  split.halves_before[task.chunks * kManyTokens] = static_cast<int32_t>(half - split.halves);
}

// Whether sums of spans take less time than those of pairs: four fifths of it, but as much as of four groups for each that is
// left out, where a halved one takes as much as three.
FEWBIT_INLINE bool by_spans(const SegmentTask& task, int64_t tokens) {
  int64_t groups = 0, halves = 0;
  for (int64_t row = 0; row < tokens; row++) {
    const Split split(task, row);
    const int64_t here = split.groups_at(task.chunks);
    if (here < 0) return false;
    groups += here, halves += split.halves_at(task.chunks);
  }
  return groups * 4 <= tokens * task.chunks * 8 / 5 + halves * 3;
}

}  // namespace
}  // namespace fewbit
