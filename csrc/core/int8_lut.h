// SPDX-License-Identifier: Apache-2.0
// Codes that index a table of fixed-point levels (see FixedPoint), as operands of int8.h. Included after an ISA's
// dot.h, which offers for this
//
//   Shuffle            16 bytes, looked up by the bytes of a lane:
//     Shuffle(bytes), operator()(index), and within(index), which is 0 where the index is 16 or more
//   kLevelBits         bits of a byte that Dot<kLevelBits> takes in one plane: 8 where it takes any byte
//   Words              levels of 16 bits as two planes, made of their low and high bytes:
//     kHighOrigin      what is added to the high bytes before they are looked up
//     X, Sum, kBegins, kOrigin, split(low, high, plane), value(sums)    as those of an operand, whose origin kOrigin is
#pragma once

#include "core/int8.h"

namespace fewbit {
namespace {

// One byte a code: 16 at a time are looked up, and those that other high bits of the code mean are dropped.
template <int BITS>
struct ByteTable {
  static constexpr int kParts = BITS <= 4 ? 1 : 1 << (BITS - 4);
  Shuffle part[kParts];

  FEWBIT_INLINE U operator()(U codes) const {
    if constexpr (BITS <= 4) {
      return part[0](codes);
    } else {
      U found = part[0].within(codes);
      for (uint32_t i = 1; i < kParts; i++) found = combine(found, part[i].within(flip(codes, i * 0x10101010u)));
      return found;
    }
  }

  // The byte of each level + origin that begins at bit `shift`.
  FEWBIT_INLINE ByteTable(const FixedPoint& table, int origin, int shift) {
    for (int i = 0; i < kParts; i++) {
      uint8_t bytes[16];
      for (int j = 0; j < 16; j++)
        bytes[j] = static_cast<uint8_t>((table.level[i * 16 + (j & ((1 << BITS) - 1))] + origin) >> shift);
      part[i] = Shuffle(bytes);
    }
  }
};

constexpr int kLevelOrigin = 1 << (kLevelBits - 1), kMostLevel = kLevelOrigin - 1;

// Levels within +-kMostLevel: bytes around kLevelOrigin.
template <int BITS>
struct LutBytes {
  static constexpr int kBits = BITS, kPlanes = 1, kFields = 1, kApart = 0;
  using X = int8_t;
  using Sum = Dot<kLevelBits>;
  static constexpr int kBegins = 0;
  static constexpr float origin = Sum::kOrigin - kLevelOrigin;
  ByteTable<BITS> table;
  float step;

  explicit FEWBIT_INLINE LutBytes(const SegmentTask& task) : table(*task.table, kLevelOrigin, 0), step(task.table->step) {}

  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = table(codes); }
  FEWBIT_INLINE F value(const Sum (&dot)[1]) const { return dot[0].value(); }
};

// Any levels of 16 bits.
template <int BITS>
struct LutWords {
  static constexpr int kBits = BITS, kPlanes = 2, kFields = 1, kApart = 0;
  using X = Words::X;
  using Sum = Words::Sum;
  static constexpr int kBegins = Words::kBegins;
  static constexpr float origin = Words::kOrigin;
  ByteTable<BITS> low, high;
  float step;

  explicit FEWBIT_INLINE LutWords(const SegmentTask& task)
      : low(*task.table, 0, 0), high(*task.table, Words::kHighOrigin * 256, 8), step(task.table->step) {}

  FEWBIT_INLINE void split(U codes, U (&plane)[2]) const { Words::split(low(codes), high(codes), plane); }
  FEWBIT_INLINE F value(const Sum (&dot)[2]) const { return Words::value(dot); }
};

template <template <int> class K>
void int8_lut_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.bits) {
    case 1: return int8_strips<K<1>>(task, tile_begin, tile_end, tokens);
    case 2: return int8_strips<K<2>>(task, tile_begin, tile_end, tokens);
    case 3: return int8_strips<K<3>>(task, tile_begin, tile_end, tokens);
    case 4: return int8_strips<K<4>>(task, tile_begin, tile_end, tokens);
    case 5: return int8_strips<K<5>>(task, tile_begin, tile_end, tokens);
    case 6: return int8_strips<K<6>>(task, tile_begin, tile_end, tokens);
  }
}

}  // namespace
}  // namespace fewbit
