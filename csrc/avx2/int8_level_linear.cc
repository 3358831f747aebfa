// SPDX-License-Identifier: Apache-2.0
// Tables whose levels take a byte, times three tokens and more. Sums of products stay in int16 for four groups of four columns,
// as activations are made to be small enough for that: 127 times the sum of their magnitudes fits. Few groups are not; those
// are left out, and multiplied by themselves. All others take two and a half instructions for 32 products, where products of
// int16 take four.
#include "avx2/dot.h"
#include "avx2/halves.h"
#include "avx2/rests.h"

#include "core/int8_lut.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int kMostByte = 127;

// Sums of (u - 127) * x for bytes u below 255 and activations of which no pair's magnitudes exceed 128, those of a span 255.
struct LevelSum : NarrowSum<6> {
  static constexpr int kCentre = kMostByte;
  using Rests = fewbit::Rests<kManyTokens>;
  static constexpr int rests_beside(int) { return 1; }  // of many rows, many have some
  static_assert(kSpan == 4 && kStarts == 2 && kMostByte * 255 <= 32767 && 2 * kMostByte * 128 <= 32767);

  // Of halves, as 254 times those of a pair fits int16.
  template <int T, int H>
  static FEWBIT_INLINE void add_rest(U (&sum)[T][H], int h, const X* x, const uint8_t* codes) {
    const U here = four(x), half = half_of(here), other = _mm256_sub_epi8(here, half);
    const U centre = _mm256_maddubs_epi16(_mm256_set1_epi8(kMostByte), here);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const U u = load_lanes(codes + t * kLanes * 4);
      const U both = _mm256_add_epi16(_mm256_maddubs_epi16(u, half), _mm256_maddubs_epi16(u, other));
      sum[t][h] = add(sum[t][h], widened(_mm256_sub_epi16(both, centre)));
    }
  }
};

// Sums of u * x of which no pair's magnitudes, of one sign, exceed 128.
struct LevelPairs : PairSum {
  using Rests = LevelSum::Rests;
  static constexpr int rests_beside(int) { return 1; }

  template <int T, int H>
  static FEWBIT_INLINE void add_rest(U (&sum)[T][H], int h, const X* x, const uint8_t* codes) {
    const U here = four(x), half = half_of(here), other = _mm256_sub_epi8(here, half), one = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const U u = load_lanes(codes + t * kLanes * 4);
      sum[t][h] = add(sum[t][h], _mm256_madd_epi16(_mm256_maddubs_epi16(u, half), one));
      sum[t][h] = add(sum[t][h], _mm256_madd_epi16(_mm256_maddubs_epi16(u, other), one));
    }
  }
};

// A byte is a level plus 127. What that adds LevelSum leaves out; sums of pairs begin with what it comes to.
template <int BITS, class NARROW>
struct Levels {
  static constexpr int kBits = BITS, kPlanes = 1, kApart = 0, kFields = 1, kBegins = NARROW::kStarts > 0 ? -1 : 0;
  static constexpr float origin = -kMostByte;
  using X = int8_t;
  struct Sum {
    using Narrow = NARROW;
  };
  ByteTable<BITS> table;
  float step;

  explicit FEWBIT_INLINE Levels(const SegmentTask& task) : table(*task.table, kMostByte, 0), step(task.table->step) {}
  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = table(codes); }
};

// Whether only the pairs of a row are small. A word behind the rests of those computed together says so.
inline int32_t& only_pairs(const SegmentTask& task, int64_t row) {
  const int64_t within = row % kManyTokens;
  return task.rests[(row - within + kManyTokens) * task.chunks * LevelSum::Rests::kWords - 1 - within];
}

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
// pairs, where those would be too many.
void leave_out(const SegmentTask& task, int64_t row) {
  constexpr int64_t kMost = 12;  // one of as many groups
  const int64_t apart = task.together * 32;
  int8_t* const x = row_of<int8_t>(task, row);
  int32_t* starts = task.starts + (x - static_cast<int8_t*>(task.activations)) / 32 * LevelSum::kStarts;
  const LevelSum::Rests rests(task, row);
  int64_t kept = 0;
  const auto at = [&](int64_t c) { return reinterpret_cast<uint8_t*>(x + c * apart); };
  for (int64_t c = 0; c < task.chunks; c++)
    kept += __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(kept_groups(load_lanes(at(c))))));
  const bool pairs = (task.chunks * 8 - kept) * kMost > task.chunks * 8;
  for (int64_t c = 0; c < task.chunks; c++, starts += task.together * LevelSum::kStarts) {
    const U here = load_lanes(at(c)), large = large_pairs(here), kept_here = kept_groups(here);
    const U rest = pairs ? mask(half_of(here), large) : _mm256_andnot_si256(kept_here, here), stays = _mm256_sub_epi8(here, rest);
    store_lanes(at(c), stays);
    rests.put(c, rest, pairs ? _mm256_cmpeq_epi32(large, repeat(0)) : kept_here);
    U sum = _mm256_maddubs_epi16(_mm256_set1_epi8(1), stays);
    sum = _mm256_add_epi16(sum, _mm256_srli_si256(sum, 8));
    sum = _mm256_add_epi16(sum, _mm256_srli_si256(sum, 4));
    sum = _mm256_mullo_epi16(sum, _mm256_set1_epi16(-kMostByte));
    starts[0] = _mm256_extract_epi32(sum, 0), starts[1] = _mm256_extract_epi32(sum, 4);
  }
  only_pairs(task, row) = pairs;
}

void round_levels(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  leave_out(task, token);
}

template <class NARROW>
void run_by(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  if (task.arranged) return strips_spans<InHalves<Levels<3, NARROW>>>(task, begin, end, tokens);
  switch (task.bits) {
    case 1: return strips_spans<Levels<1, NARROW>>(task, begin, end, tokens);
    case 2: return strips_spans<Levels<2, NARROW>>(task, begin, end, tokens);
    case 3: return strips_spans<Levels<3, NARROW>>(task, begin, end, tokens);
    case 4: return strips_spans<Levels<4, NARROW>>(task, begin, end, tokens);
    case 5: return strips_spans<Levels<5, NARROW>>(task, begin, end, tokens);
    case 6: return strips_spans<Levels<6, NARROW>>(task, begin, end, tokens);
  }
}

// Both take what rows LevelSum takes.
void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  bool pairs = false;
  for (int64_t row = 0; row < tokens; row++) pairs |= only_pairs(task, row) != 0;
  pairs ? run_by<LevelPairs>(task, begin, end, tokens) : run_by<LevelSum>(task, begin, end, tokens);
}

}  // namespace

const FewKernel int8_level_linear_avx2 = {
    kMostByte, {kManyTokens, 1, 1, round_levels, run, LevelSum::kStarts, LevelSum::Rests::kWords}};

}  // namespace fewbit
