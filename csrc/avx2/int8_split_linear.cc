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
  static constexpr int kBits = 8, kPlanes = 1, kBegins = 0;
  static constexpr float step = 1;
  using X = int8_t;
  struct Sum {
    using Narrow = NARROW;
  };
  float origin;

  explicit FEWBIT_INLINE Bytes(const SegmentTask& task) : origin(-task.whole) {}
  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = codes; }
};

// Whole codes, beside the halves that are listed of one or two tokens.
template <class K>
struct WithHalves : K {
  using RestSum = PairsOfBytes;
  template <int M>
  using Rests = RestsOfTokens<M>;

  using K::K;
  FEWBIT_INLINE U at(const uint8_t* codes, int g) const { return quad_at<8>(codes, g); }
};

// Codes as they are, beside these tokens.
struct FewBytes : Bytes<void> {
  using Sum = PairsOfBytes;

  using Bytes<void>::Bytes;
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

// By planes of 4 bits, if a token was left whole; the other may have been halved.
void few_run(const SegmentTask& task, int64_t tile, int64_t, int64_t tokens) {
  using Pairs = WithHalves<FewBytes>;
  using Planes = WithHalves<Codes<8>>;
  const bool whole = any_whole(task);
  if (task.together == 1 && whole) return strips_settled<Planes, 2, 1>(task, tile, tokens);
  if (task.together == 1) return strips_settled<Pairs, 8, 1>(task, tile, tokens);
  if (whole) return strips_settled<Planes, 2, 2>(task, tile, tokens);
  strips_settled<Pairs, 4, 2>(task, tile, tokens);
}

}  // namespace

const SegmentKernel int8_split_linear_avx2 = {
    kManyTokens, 1, 1, round_split, run, LevelSum<kMiddle>::kStarts, Split::kWords};

const SegmentKernel int8_few_split_linear_avx2 = {kManyTokens, 1, 1, round_halved, few_run, 0, RestList::kWords};

}  // namespace fewbit
