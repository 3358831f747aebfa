// SPDX-License-Identifier: Apache-2.0
// Tables whose levels take a byte, times three tokens and more. Sums of products stay in int16 for four groups of four columns,
// as activations are made to be small enough for that: 127 times the sum of their magnitudes fits. Few groups are not; those
// are left out, and multiplied by themselves. All others take two and a half instructions for 32 products, where products of
// int16 take four.
#include "avx2/dot.h"
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

// A byte is a level plus 127, which sums are of the products less 127 of.
template <int BITS>
struct Levels {
  static constexpr int kBits = BITS, kPlanes = 1, kApart = 0, kFields = 1, kBegins = -1;
  static constexpr float origin = -kMostByte;
  using X = int8_t;
  struct Sum {
    using Narrow = LevelSum;
  };
  ByteTable<BITS> table;
  float step;

  explicit FEWBIT_INLINE Levels(const SegmentTask& task) : table(*task.table, kMostByte, 0), step(task.table->step) {}
  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = table(codes); }
};

// Leaves out the groups of a rounded row that are too large, and makes what sums of the others begin with.
void leave_out(const SegmentTask& task, int64_t row) {
  int8_t* x = row_of<int8_t>(task, row);
  int32_t* starts = task.starts + (x - static_cast<int8_t*>(task.activations)) / 32 * LevelSum::kStarts;
  const LevelSum::Rests rests(task, row);
  const U zero = _mm256_setzero_si256(), one = _mm256_set1_epi8(1);
  const auto within = [=](U sums, int16_t most) {
    return _mm256_cmpeq_epi32(_mm256_cmpgt_epi16(sums, _mm256_set1_epi16(most)), zero);
  };
  for (int64_t c = 0; c < task.chunks; c++, x += task.together * 32, starts += task.together * LevelSum::kStarts) {
    const U here = load_lanes(reinterpret_cast<const uint8_t*>(x));
    U pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(here), one);  // of a group, magnitudes of columns 0 and 1, and of 2 and 3
    const U small = within(pairs, 128);
    pairs = mask(pairs, small);
    pairs = _mm256_add_epi16(pairs, _mm256_slli_si256(pairs, 4));
    pairs = _mm256_add_epi16(pairs, _mm256_slli_si256(pairs, 8));  // with the groups of the span before
    const U kept = mask(small, within(pairs, 255)), stays = mask(here, kept);
    store_lanes(reinterpret_cast<uint8_t*>(x), stays);
    rests.put(c, here, kept);
    U sum = _mm256_maddubs_epi16(one, stays);
    sum = _mm256_add_epi16(sum, _mm256_srli_si256(sum, 8));
    sum = _mm256_add_epi16(sum, _mm256_srli_si256(sum, 4));
    sum = _mm256_mullo_epi16(sum, _mm256_set1_epi16(-kMostByte));
    starts[0] = _mm256_extract_epi32(sum, 0), starts[1] = _mm256_extract_epi32(sum, 4);
  }
}

void round_levels(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  leave_out(task, token);
}

void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  switch (task.bits) {
    case 1: return strips_spans<Levels<1>>(task, begin, end, tokens);
    case 2: return strips_spans<Levels<2>>(task, begin, end, tokens);
    case 3: return strips_spans<Levels<3>>(task, begin, end, tokens);
    case 4: return strips_spans<Levels<4>>(task, begin, end, tokens);
    case 5: return strips_spans<Levels<5>>(task, begin, end, tokens);
    case 6: return strips_spans<Levels<6>>(task, begin, end, tokens);
  }
}

}  // namespace

const FewKernel int8_level_linear_avx2 = {
    kMostByte, {kManyTokens, 1, 1, round_levels, run, LevelSum::kStarts, LevelSum::Rests::kWords}};

}  // namespace fewbit
