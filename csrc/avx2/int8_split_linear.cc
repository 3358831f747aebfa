// SPDX-License-Identifier: Apache-2.0
// Codes of 8 bits. vpmaddubsw adds two products of bytes in int16, which holds them unless two
// activations of the same sign are large: 255 (|a| + |b|) is past it where |a| + |b| > 128. Few pairs are, and few sums of eight
// magnitudes are above 255, up to which those of four such products fit, of codes around 0: see level_sums.h. One token and two
// take pairs.
#include "avx2/halved.h"
#include "avx2/level_sums.h"

#include "core/int8.h"

namespace fewbit {
namespace {

constexpr int kMiddle = 128;

// Codes as they are.
template <class NARROW>
struct Bytes {
  static constexpr int kBits = 8, kPlanes = 1, kApart = 0, kFields = 1, kBegins = 0;
  static constexpr float step = 1;
  using X = int8_t;
  struct Sum {
    using Narrow = NARROW;
  };
  float origin;

  explicit FEWBIT_INLINE Bytes(const SegmentTask& task) : origin(-task.whole) {}
  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = codes; }
};

// The same beside one or two tokens.
struct FewBytes : Bytes<void> {
  using Sum = PairsOfBytes;
  template <int M>
  using Rests = RestsOfTokens<M>;

  using Bytes<void>::Bytes;
  FEWBIT_INLINE U at(const uint8_t* codes, int g) const { return quad_at<8>(codes, g); }
  FEWBIT_INLINE F value(const Sum (&dot)[1]) const { return dot[0].value(); }
};

void round_split(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  split_row<kMiddle>(task, token);
}

void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  if (by_spans(task, tokens)) strips_spans<Bytes<LevelSum<kMiddle>>>(task, begin, end, tokens);
  else strips_spans<Bytes<LevelPairs>>(task, begin, end, tokens);
}

void round_halved(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  list_halves(task, token, true);
}

void few_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  if (any_whole(task)) return int8_strips<Codes<8>>(task, tile_begin, tile_end, tokens);
  if (task.together == 1) return strips_settled<FewBytes, 8, 1>(task, tile_begin, tokens);
  strips_settled<FewBytes, 4, 2>(task, tile_begin, tokens);
}

}  // namespace

const SegmentKernel int8_split_linear_avx2 = {
    kManyTokens, 1, 1, round_split, run, LevelSum<kMiddle>::kStarts, Split::kWords};

const SegmentKernel int8_few_split_linear_avx2 = {kManyTokens, 1, 1, round_halved, few_run, 0, RestList::kWords};

}  // namespace fewbit
