// SPDX-License-Identifier: Apache-2.0
// Tables whose levels take a byte, times three tokens and more: see level_sums.h.
#include "avx2/halves.h"
#include "avx2/level_sums.h"

#include "core/int8_lut.h"

namespace fewbit {
namespace {

constexpr int kMostByte = 127;

// A byte is a level plus 127. What that adds LevelSum leaves out; sums of pairs begin with what it comes to.
template <int BITS, class NARROW>
struct Levels {
  static constexpr int kBits = BITS, kPlanes = 1, kBegins = NARROW::kStarts > 0 ? -1 : 0;
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

void round_levels(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  split_row<kMostByte>(task, token);
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

void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  if (by_spans(task, tokens)) run_by<LevelSum<kMostByte>>(task, begin, end, tokens);
  else run_by<LevelPairs>(task, begin, end, tokens);
}

}  // namespace

const FewKernel int8_level_linear_avx2 = {
    kMostByte, {kManyTokens, 1, 1, round_levels, run, LevelSum<kMostByte>::kStarts, Split::kWords}};

}  // namespace fewbit
