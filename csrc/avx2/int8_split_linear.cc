// SPDX-License-Identifier: Apache-2.0
// Codes of 8 bits times three tokens and more. vpmaddubsw adds two products of bytes in int16, which holds them unless two
// activations of the same sign are large: 255 (|a| + |b|) is past it where |a| + |b| > 128. Few pairs are. Those are split in
// halves, of which one stays where it was and the other, its rest, is multiplied by itself. All others take three
// instructions for 32 products, where two planes of nibbles (core/int8.h) take four.
#include "avx2/dot.h"
#include "avx2/rests.h"

#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

struct SplitSum : PairSum {
  static constexpr int kCentre = 128, kStarts = 1;
  using Rests = fewbit::Rests<kManyTokens>;
  static constexpr int rests_beside(int tokens) { return tokens; }

  static inline U start(const int32_t* at) { return _mm256_set1_epi32(*at); }
  static FEWBIT_INLINE void add_rest(U (&sum)[2][4], int, const X* x, const uint8_t* codes) {
    step(sum, load_lanes(codes), load_lanes(codes + kLanes * 4), x);
  }
  static FEWBIT_INLINE void add_rest(U (&sum)[4][2], int, const X* x, const uint8_t* codes) { step(sum, codes, x, x + 32); }
};

// Codes as they are.
struct Bytes {
  static constexpr int kBits = 8, kPlanes = 1, kApart = 0, kFields = 1, kBegins = 0;
  static constexpr float step = 1;
  using X = int8_t;
  struct Sum {
    using Narrow = SplitSum;
  };
  float origin;

  explicit FEWBIT_INLINE Bytes(const SegmentTask& task) : origin(-task.whole) {}
  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = codes; }
};

// Halves the pairs of a rounded row that are too large, and writes what sums of a segment begin with.
void split_row(const SegmentTask& task, int64_t row) {
  int8_t* x = row_of<int8_t>(task, row);
  int32_t* starts = task.starts + (x - static_cast<int8_t*>(task.activations)) / 32;
  const SplitSum::Rests rests(task, row);
  for (int64_t c = 0; c < task.chunks; c++, x += task.together * 32) {
    const U here = load_lanes(reinterpret_cast<const uint8_t*>(x)), large = large_pairs(here);
    const U none = _mm256_cmpeq_epi32(large, repeat(0)), rest = mask(half_of(here), large);
    store_lanes(reinterpret_cast<uint8_t*>(x), _mm256_sub_epi8(here, rest));
    rests.put(c, rest, none);
    starts[c * task.together] = 0;
  }
  for (int64_t s = 0; s < task.segments; s++)
    starts[s * task.segment_chunks * task.together] = -SplitSum::kCentre * static_cast<int32_t>(*sum_at(task, row, s));
}

void round_split(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  split_row(task, token);
}

void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  strips_spans<Bytes>(task, tile_begin * kGroupsPerTile, tile_end * kGroupsPerTile, tokens);
}

}  // namespace

const SegmentKernel int8_split_linear_avx2 = {kManyTokens, 1, 1, round_split, run, SplitSum::kStarts, SplitSum::Rests::kWords};

}  // namespace fewbit
