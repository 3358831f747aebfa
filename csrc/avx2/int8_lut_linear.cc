// SPDX-License-Identifier: Apache-2.0
#include "avx2/dot.h"

#include "core/int8_lut.h"

namespace fewbit {
namespace {

// Levels of -127 .. 127 beside one or two tokens.
template <int BITS>
struct LutSigned {
  static constexpr int kBits = BITS, kPlanes = 1, kFields = 1;
  using X = int8_t;
  using Sum = SignedBytes;
  static constexpr int kBegins = -1;
  static constexpr float origin = 0;
  ByteTable<BITS> table;
  float step;

  explicit FEWBIT_INLINE LutSigned(const SegmentTask& task) : table(*task.table, 0, 0), step(task.table->step) {}

  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = table(codes); }
  FEWBIT_INLINE F value(const Sum (&dot)[1]) const { return dot[0].value(); }
};

// Two codes are half a byte, by which the level of either is looked up: one mask serves both.
template <>
struct LutSigned<2> {
  static constexpr int kBits = 2, kPlanes = 1, kFields = 1;
  using X = int8_t;
  using Sum = SignedBytes;
  static constexpr int kBegins = -1;
  static constexpr float origin = 0;
  static constexpr bool kAt = true;
  Shuffle level[2];
  float step;

  explicit FEWBIT_INLINE LutSigned(const SegmentTask& task) : step(task.table->step) {
    for (int i = 0; i < 2; i++) {
      uint8_t bytes[16];
      for (int j = 0; j < 16; j++) bytes[j] = static_cast<uint8_t>(task.table->level[j >> 2 * i & 3]);
      level[i] = Shuffle(bytes);
    }
  }

  FEWBIT_INLINE U at(U part, int g) const { return level[g % 2](mask(shifted(part, g / 2 % 2 * 4), 0x0f0f0f0fu)); }
  FEWBIT_INLINE F value(const Sum (&dot)[1]) const { return dot[0].value(); }
};

template <class K>
void signed_strips(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  if (task.together == 1) return strips_settled<K, direct1(K::kBits), 1>(task, begin, end, tokens);
  strips_settled<K, kDirect2, 2>(task, begin, end, tokens);
}

void signed_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.bits) {
    case 1: return signed_strips<LutSigned<1>>(task, tile_begin, tile_end, tokens);
    case 2: return signed_strips<LutSigned<2>>(task, tile_begin, tile_end, tokens);
    case 3: return signed_strips<LutSigned<3>>(task, tile_begin, tile_end, tokens);
    case 4: return signed_strips<LutSigned<4>>(task, tile_begin, tile_end, tokens);
    case 5: return signed_strips<LutSigned<5>>(task, tile_begin, tile_end, tokens);
    case 6: return signed_strips<LutSigned<6>>(task, tile_begin, tile_end, tokens);
  }
}

// By the above, which takes all levels that these take.
template <int BITS>
constexpr bool kFewElsewhere<LutBytes<BITS>> = true;
static_assert(SignedBytes::kMost >= kMostLevel);

}  // namespace

const LutKernels int8_lut_linear_avx2 = {
    kMostLevel,
    {kManyTokens, 1, 1, round_begun, int8_lut_run<LutBytes>, kMostStarts},
    {kManyTokens, sizeof(Words::X), 1, round_token<Words::X>, int8_lut_run<LutWords>}};

const FewKernel int8_few_lut_linear_avx2 = {SignedBytes::kMost, {kManyTokens, 1, 1, round_token<int8_t>, signed_run}};

}  // namespace fewbit
