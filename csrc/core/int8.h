// SPDX-License-Identifier: Apache-2.0
// y = x W^T for activations rounded to int8: products of bytes, summed in int32. Included after an ISA's dot.h, which
// offers
//
//   Dot<BITS>          sums of byte * activation, four columns a lane, for bytes below 2^BITS:
//     kGroups          groups of four columns after which `flush` must be called
//     kOrigin          what the bytes are shifted down by before they are multiplied
//     add(u, x)        u: four bytes a lane; x: four activations, the same in every lane
//     begin(integer)   as in segments.h
//     flush(), value() the lanes' sums as floats
//     merge(dot, bits) adds another chain's sums, divided by 2^bits; where a row group keeps more than one
//   direct1(BITS), kDirect2, kDirect4, kDirect8    row groups beside one, two, up to four and up to eight tokens; the
//                      last two may be 0: computed as where there are many,
//                      and the very last is where these are fewer than eight
//   kDirectChains      sums a row group keeps beside one or two tokens
//   kAlone, kAlone2    the same where row groups are taken one by one (see SegmentTask); 0: they never are
//   kUnrollMany                          see decoded.h
//   kMany, kManyTokens                   row groups and tokens computed together where there are many
//   digits1(BITS), kDigits2, kAloneDigits, kManyDigits    row groups, sums and row groups as above for activations of 24 bits;
//                      only where there is a int24_linear.cc; one row group is never computed as in few.h
//   planes(BITS)       2 where codes of 8 bits are multiplied as two planes of nibbles, else 1
//   kFew               whether one and two tokens are computed as in few.h
//   kInPlace           whether any byte may be multiplied: a field of several in a byte then need not be shifted
//     kSums            sums beside which masks of fields have room in registers
//     add_once(u, x)   add, where no other sum takes these activations
//     Rows, Pair       see pairs.h; or neither
//     Narrow           see spans.h; or not
//
// An operand's (see segments.h) activations are int8_t, or int16_t where widening them once spares many times, and its
// value is rounded to float32 once. What is computed is the same everywhere, bit for bit: sums are exact integers, and
// scales are applied by fused multiply-adds in one order.
#pragma once

#include "core/beside.h"
#include "core/decoded.h"
#include "core/few.h"

namespace fewbit {
namespace {

// Fields of a byte that are multiplied where they stand; of 1 bit the upper four are shifted down, for fewer sums.
constexpr int fields_of(int bits) { return !kInPlace || part_count(bits) > 1 ? 1 : bits == 1 ? 4 : 8 / bits; }

// Codes that are their own levels.
template <int BITS, int FIELDS = fields_of(BITS)>
struct Codes {
  static constexpr int kBits = BITS, kPlanes = planes(BITS), kApart = 0, kFields = FIELDS;
  static constexpr bool kOwn = true;  // see spans.h
  using X = int8_t;
  using Sum = Dot<kPlanes == 2 ? 4 : BITS>;
  static constexpr int kBegins = BITS == 1 ? -1 : 0;  // the zero of a bit is a half
  static constexpr float step = 1;
  float origin;
  U field[kFields];  // masks, in registers

  explicit FEWBIT_INLINE Codes(const SegmentTask& task) : origin(Sum::kOrigin - task.whole) {
    for (int i = 0; i < kFields; i++) {
      field[i] = repeat(0x01010101u * (((1u << BITS) - 1) << i * BITS));
      keep(field[i]);
    }
  }

  // Codes of columns 4g .. 4g+3, times 2^(g % kFields * BITS).
  FEWBIT_INLINE U in_place(U part, int g) const {
    const int extra = g * BITS % 8 - g % kFields * BITS;
    return mask(extra ? shift_right(part, extra) : part, field[g % kFields]);
  }

  FEWBIT_INLINE void split(U codes, U (&plane)[kPlanes]) const {
    if constexpr (kPlanes == 1) {
      plane[0] = codes;
    } else {
      plane[0] = mask(codes, 0x0f0f0f0fu);
      plane[1] = mask(shift_right(codes, 4), 0x0f0f0f0fu);
    }
  }

  FEWBIT_INLINE F value(const Sum (&dot)[kPlanes]) const {
    if constexpr (kPlanes == 2) return add(dot[0].value(), multiply(dot[1].value(), broadcast(16.0f)));
    return dot[0].value();
  }
};

// Row groups one by one with `alone` sums each, or by T.
template <class K, int T, int M, int alone>
FEWBIT_INLINE void strips_few(const SegmentTask& task, int64_t group, int64_t end, int64_t tokens) {
  if constexpr (kFew) {
    strips_settled<K, T, M>(task, group / kGroupsPerTile, tokens);
  } else {
    constexpr int fields = K::kFields, chains = fields > 1 ? fields : kDirectChains;
    if constexpr (alone > 0)
      if (task.alone) return strips_direct<K, 1, M, (fields > 1 ? fields : alone)>(task, group, end, tokens);
    constexpr int room = kSums / (fields * M), beside = fields == 1 || room > T ? T : room > 1 ? room : 1;
    strips_direct<K, beside, M, chains>(task, group, end, tokens);
  }
}

// Whether another kernel takes one and two tokens of an operand, always.
template <class K>
constexpr bool kFewElsewhere = false;

// Row groups beside one token. As in few.h, parts of codes take registers for one tile at a time.
template <class K>
constexpr int kDirect1 = kInHalves<K> || (kFew && K::kPlanes == 1) ? 4 : direct1(K::kBits);

// Row groups beside two.
template <class K>
constexpr int kBesideTwo = kFew && K::kPlanes == 1 && part_count(K::kBits) == 1 ? 4 : kDirect2;

template <class K>
void int8_strips(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  if constexpr (!kFewElsewhere<K>) {
    if (task.together == 1) {
      // Sums of a long row are merged once: as many as hide the latency of a product.
      if constexpr (K::kBits == 1 && K::kFields > 1 && kAlone > 0)
        if (task.alone && task.segment_chunks > kPart) return strips_direct<Codes<1, 8>, 1, 1, 8>(task, begin, end, tokens);
      return strips_few<K, kDirect1<K>, 1, kAlone>(task, begin, end, tokens);
    }
    if (task.together == 2) return strips_few<K, kBesideTwo<K>, 2, kAlone2>(task, begin, end, tokens);
  }
  if (kDirect4 && sizeof(typename K::X) == 1 && task.together == 4 && tokens <= 4)
    return strips_direct<K, share<K>(kDirect4), 4, 1>(task, begin, end, tokens);
  if (kDirect8 && task.together == 8 && tokens <= 8)
    return strips_direct<K, share<K>(kDirect8), 8, 1>(task, begin, end, tokens);
  if constexpr (kHasSpans<typename K::Sum>)
    strips_spans<K>(task, begin, end, tokens);
  else
    strips_decoded<K, kMany, kManyTokens>(task, begin, end, tokens);
}

inline void int8_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.bits) {
    case 1: return int8_strips<Codes<1>>(task, tile_begin, tile_end, tokens);
    case 2: return int8_strips<Codes<2>>(task, tile_begin, tile_end, tokens);
    case 3: return int8_strips<Codes<3>>(task, tile_begin, tile_end, tokens);
    case 4: return int8_strips<Codes<4>>(task, tile_begin, tile_end, tokens);
    case 5: return int8_strips<Codes<5>>(task, tile_begin, tile_end, tokens);
    case 6: return int8_strips<Codes<6>>(task, tile_begin, tile_end, tokens);
    case 7: return int8_strips<Codes<7>>(task, tile_begin, tile_end, tokens);
    case 8: return int8_strips<Codes<8>>(task, tile_begin, tile_end, tokens);
  }
}

}  // namespace
}  // namespace fewbit
