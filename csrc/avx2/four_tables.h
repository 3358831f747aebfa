// SPDX-License-Identifier: Apache-2.0
// Activations as tables of what four of them add up to, by a bit each: with as much more as makes the least of them 0, the most is
// the sum of their magnitudes. Two fours are looked up together where their sums fit a byte, 255; the four that does not is left
// out of them, and listed. Where too many would be, fours are looked up by themselves.
//
// Magnitudes are those of what a code stands for, code - zero, not of what is multiplied, code - 128: on a grid whose zero is far from
// 128 (of activations that are never negative: 0) nearly all of the latter are large. How many bits a row has set says what lies between.
#pragma once

#include "avx2/bit_tables.h"

namespace fewbit {
namespace {

constexpr int kFours = 8;           // of a chunk, as they lie in it once sorted by place: four of a half, then those of the other
constexpr int64_t kMostLarge = 6;   // one pair of as many
constexpr int64_t kLongPart = 4;    // chunks of a part of a long segment

// A four that is left out: its place in the row, and its sums, two bits of each in `high`.
struct LeftFour {
  int32_t four;
  uint32_t high;
  uint8_t low[16];

  FEWBIT_INLINE U table_of_high() const {
    const auto spread = [](uint32_t bits) { return static_cast<int64_t>(_pdep_u64(bits & 0xffff, 0x0303030303030303u)); };
    return _mm256_broadcastsi128_si256(_mm_set_epi64x(spread(high >> 16), spread(high)));
  }
};

// How sums of a part of a row become products: `words` are added to what was looked up, modulo 2^16, and `less` taken off floats.
struct PartOfToken {
  float less;
  uint32_t words;
};

struct OfToken {
  int32_t zero;  // of its grid
  bool paired;   // whether fours are
};

// What a token is made into: (chunks, kFours, 16) bytes of tables, then those left out and one beyond all; behind them what it was
// rounded to, and when that is no longer needed, for each part of a row how its sums are read, and what holds for all of it.
class FourTables {
 public:
  static constexpr int64_t kTables = kFours * 16, kList = kFours * static_cast<int64_t>(sizeof(LeftFour));  // bytes of a chunk
  static constexpr int64_t kBytes = kTables + kList + 32;

  FEWBIT_INLINE FourTables(const SegmentTask& task, int64_t token)
      : chunks_(task.chunks), tables_(static_cast<uint8_t*>(task.activations) + token * task.chunks * kBytes) {}

  FEWBIT_INLINE uint8_t* chunk(int64_t c) const { return tables_ + c * kTables; }
  FEWBIT_INLINE LeftFour* left() const { return reinterpret_cast<LeftFour*>(tables_ + chunks_ * kTables); }
  FEWBIT_INLINE int8_t* rounded() const { return reinterpret_cast<int8_t*>(tables_ + chunks_ * (kTables + kList)); }
  FEWBIT_INLINE PartOfToken& part(int64_t p) const { return reinterpret_cast<PartOfToken*>(rounded() + 4)[p]; }
  FEWBIT_INLINE OfToken& all() const { return *reinterpret_cast<OfToken*>(&part(chunks_)); }

 private:
  int64_t chunks_;
  uint8_t* tables_;
};

// Sums of fours of bytes, one a lane.
FEWBIT_INLINE U four_sums(U bytes) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

// How far 32 codes, rounded and sorted by place, lie above the zero of their grid and below it.
struct Distances {
  U above, below;

  FEWBIT_INLINE Distances(U sorted, int32_t zero) {
    const U codes = flip(sorted, 0x80808080u), middle = _mm256_set1_epi8(static_cast<char>(zero));
    above = _mm256_subs_epu8(codes, middle), below = _mm256_subs_epu8(middle, codes);
  }
  FEWBIT_INLINE U magnitudes() const { return combine(above, below); }
};

// A bit for each pair of fours whose magnitudes add up to more than a byte holds.
FEWBIT_INLINE uint32_t large_pairs_of(U magnitudes) {
  const U sums = _mm256_sad_epu8(magnitudes, repeat(0));
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(sums, _mm256_set1_epi64x(255)))));
}

// A bit for each four that is to be left out: of a large pair the larger one, and any that is large by itself.
FEWBIT_INLINE uint32_t large_fours(U magnitudes, bool paired) {
  const U sums = four_sums(magnitudes), others = _mm256_shuffle_epi32(sums, 0xb1);
  const U alone = _mm256_cmpgt_epi32(sums, _mm256_set1_epi32(255));
  const U first = _mm256_set1_epi64x(0xffffffff);  // of two that are as large, the first one
  const U larger = _mm256_cmpgt_epi32(_mm256_sub_epi32(sums, first), others);
  const U pair = _mm256_cmpgt_epi32(_mm256_add_epi32(sums, others), _mm256_set1_epi32(255));
  const U left = paired ? combine(alone, mask(pair, larger)) : alone;
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(left)));
}

// What four activations add up to, by the bits of 0 to 15, and all that are below zero more: those above it that are taken, and
// those below it that are not.
FEWBIT_INLINE void list_four(int32_t four, uint32_t above, uint32_t below, LeftFour* out) {
  const auto found = [&](U taken) {
    const U not_taken = flip(taken, 0x01010101u);
    return _mm256_add_epi16(_mm256_maddubs_epi16(repeat(above), taken), _mm256_maddubs_epi16(repeat(below), not_taken));
  };
  const U sum = _mm256_hadd_epi16(found(bits_of_entries(0)), found(bits_of_entries(4)));
  const U low = _mm256_and_si256(sum, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(sum, 8);
  const U bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
  const auto two_bits = [](int64_t eight) {
    return static_cast<uint32_t>(_pext_u64(static_cast<uint64_t>(eight), 0x0303030303030303u));
  };
  out->four = four;
  out->high = two_bits(_mm256_extract_epi64(bytes, 2)) | two_bits(_mm256_extract_epi64(bytes, 3)) << 16;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out->low), _mm256_castsi256_si128(bytes));
}

// Tables of fours that fit, modulo 2^8.
FEWBIT_INLINE void make_tables(const Distances& x, uint8_t* out) {
  const U signed_bytes = _mm256_sub_epi8(x.above, x.below), raised = four_sums(x.below);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    U table = _mm256_shuffle_epi8(raised, _mm256_set1_epi8(static_cast<char>(4 * j)));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const auto bit = [i](int k) { return static_cast<char>(k >> i & 1 ? -1 : 0); };
      const U has = _mm256_broadcastsi128_si256(_mm_setr_epi8(bit(0), bit(1), bit(2), bit(3), bit(4), bit(5), bit(6), bit(7), bit(8),
                                                              bit(9), bit(10), bit(11), bit(12), bit(13), bit(14), bit(15)));
      table = _mm256_add_epi8(table, mask(has, _mm256_shuffle_epi8(signed_bytes, _mm256_set1_epi8(static_cast<char>(4 * j + i)))));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * 16), _mm256_castsi256_si128(table));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (4 + j) * 16), _mm256_extracti128_si256(table, 1));
  }
}

// Whether a row is one segment, of several parts; chunks that are summed in 16 bits.
FEWBIT_INLINE bool long_row(const SegmentTask& task) { return task.segments == 1 && task.segment_chunks > kLongPart; }
FEWBIT_INLINE int64_t part_of(const SegmentTask& task) { return long_row(task) ? kLongPart : task.segment_chunks; }

// Looked up sums, of distances from `zero`, are `raised` too high. Those of codes less 128 are another zero - 128 for each bit of a
// row, which is taken off before they become floats, 2^15 above what they are; nothing is where zero is 128.
FEWBIT_INLINE PartOfToken part_of_token(int32_t zero, int32_t raised) {
  constexpr int32_t kWordsZero = 1 << 15;
  if (zero == 128) return {static_cast<float>(raised), 0};
  return {static_cast<float>(kWordsZero), static_cast<uint32_t>(kWordsZero - raised)};
}

// The tables of a chunk, and those left out of them at `left`; returns where the next go.
FEWBIT_INLINE LeftFour* chunk_beside(int64_t c, Distances x, bool paired, uint8_t* tables, LeftFour* left) {
  if (uint32_t some = large_fours(x.magnitudes(), paired)) {
    uint32_t above[kFours], below[kFours];
    store_lanes(reinterpret_cast<uint8_t*>(above), x.above);
    store_lanes(reinterpret_cast<uint8_t*>(below), x.below);
    for (; some; some &= some - 1) {
      const int n = __builtin_ctz(some);
      list_four(static_cast<int32_t>(c * kFours) + n, above[n], below[n], left++);
      above[n] = below[n] = 0;
    }
    x.above = load_lanes(reinterpret_cast<const uint8_t*>(above));
    x.below = load_lanes(reinterpret_cast<const uint8_t*>(below));
  }
  make_tables(x, tables);
  return left;
}

// Rounds a token, and makes its tables.
inline void tables_beside(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  const FourTables to(task, token);
  const int64_t part = part_of(task);
  const int32_t zero = x.scale != 0 ? x.zero : 128;
  SegmentTask rounded = task;
  rounded.activations = to.rounded() - token * task.chunks * 32;
  round_token<int8_t>(rounded, x, token);
  const int8_t* const row = to.rounded();
  const auto of_chunk = [&](int64_t c) {
    return Distances(by_place(load_lanes(reinterpret_cast<const uint8_t*>(row + c * 32))), zero);
  };
  int64_t large = 0;
  for (int64_t c = 0; c < task.chunks; c++) large += __builtin_popcount(large_pairs_of(of_chunk(c).magnitudes()));
  const bool paired = large * kMostLarge <= task.chunks * (kFours / 2);
  LeftFour* left = to.left();
  for (int64_t c = 0, p = 0; c < task.chunks; p++) {
    const int64_t end = c + part < task.chunks ? c + part : task.chunks;
    U raised = repeat(0);
    for (; c < end; c++) {
      const Distances here = of_chunk(c);
      raised = _mm256_add_epi32(raised, four_sums(here.below));
      left = chunk_beside(c, here, paired, to.chunk(c), left);
    }
    int32_t sums[kFours];
    store_lanes(reinterpret_cast<uint8_t*>(sums), raised);
    for (int n = 1; n < kFours; n++) sums[0] += sums[n];
    to.part(p) = part_of_token(zero, sums[0]);
  }
  left->four = INT32_MAX;
  to.all() = {zero, paired};
}

}  // namespace
}  // namespace fewbit
