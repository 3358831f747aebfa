// SPDX-License-Identifier: Apache-2.0
// Tables times float activations, by looking products up: those of an activation and of all levels are integers of 24 bits,
// found once a token. Half a byte of tile16 holds one code of 3 or 4 bits, two of 2, or four of 1, so that one vpshufb looks up
// a part of what they add up to for 32 rows.
//
// Such a sum plus kRaised lies in 0 .. 2^24 - 1 and is four planes of 6 bits, of which four still add up in bytes: (32 / codes of
// half a byte, in the order in which these are met, 4 planes, 16 bytes) a chunk.
#pragma once

#include "avx2/bit_tables.h"

#include "core/int24_lut.h"

namespace fewbit {
namespace {

constexpr int kRaised24 = 1 << 23, kEntries = 4 * 16;  // bytes of what half a byte stands for

constexpr int codes_of(int bits) { return bits == 3 ? 1 : 4 / bits; }  // in half a byte
constexpr int lookups(int bits) { return 32 / codes_of(bits); }        // in a chunk

// The first column of a chunk that lookup n stands for; further ones follow by 4.
constexpr int looked_up(int bits, int n) {
  if (bits != 3) return n / 8 * (32 / bits) + n % 2 * (16 / bits) + n / 2 % 4;
  return 16 * (n / 4 % 2) + 4 * (n % 2 * 2 + n / 2 % 2) + n / 8;
}

// 16 integers, lanes 0-3, 8-11 and 4-7, 12-15, to planes of 6 bits.
inline void planes_of(U even, U odd, uint8_t* out) {
  const auto spread = [](U u) {
    const U low = combine(mask(u, 0x3fu), mask(shift_left(u, 2), 0x3f00u));
    const U high = combine(mask(shift_left(u, 4), 0x3f0000u), mask(shift_left(u, 6), 0x3f000000u));
    return by_place(combine(low, high));
  };
  const U a = spread(even), b = spread(odd);
  store_lanes(out, _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(a, b), 0xd8));
  store_lanes(out + 32, _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(a, b), 0xd8));
}

inline uint8_t* tables_of(const SegmentTask& task, int64_t token) {
  return static_cast<uint8_t*>(task.activations) + token * task.chunks * lookups(task.bits) * kEntries;
}

template <int BITS>
void product_tables(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  constexpr int kCodes = codes_of(BITS);
  const Levels24 levels(task);
  F level[kCodes][2];  // of an entry's codes
  for (int i = 0; i < kCodes; i++)
    for (int odd = 0; odd < 2; odd++) {
      float lanes[8];
      for (int l = 0; l < 8; l++) lanes[l] = levels.level[(l / 4 * 8 + odd * 4 + l % 4) >> i * BITS & ((1 << BITS) - 1)];
      level[i][odd] = load(lanes);
    }
  uint8_t* out = tables_of(task, token);
  products_of(task, x, token, levels, [&](int64_t, const float* here) {
    const U begin = repeat(static_cast<uint32_t>(kRaised24) - kCodes * static_cast<uint32_t>(kRoundBits));
    for (int n = 0; n < lookups(BITS); n++, out += kEntries) {
      U sum[2] = {begin, begin};
      for (int i = 0; i < kCodes; i++) {
        const F value = broadcast(here[looked_up(BITS, n) + 4 * i]);
        for (int odd = 0; odd < 2; odd++)
          sum[odd] = _mm256_add_epi32(sum[odd], _mm256_castps_si256(fma(value, level[i][odd], broadcast(kRound))));
      }
      planes_of(sum[0], sum[1], out);
    }
  });
}

inline void tables_of_products(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  switch (task.bits) {
    case 1: return product_tables<1>(task, x, token);
    case 2: return product_tables<2>(task, x, token);
    case 3: return product_tables<3>(task, x, token);
    case 4: return product_tables<4>(task, x, token);
  }
}

// What 32 rows add up to in four lookups, plane by plane, of bytes.
struct PlaneSums {
  U plane[4];

  FEWBIT_INLINE void look_up(U index, const uint8_t* entries, bool first) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
      const U found = _mm256_shuffle_epi8(table_at(entries + p * 16), index);
      plane[p] = first ? found : _mm256_add_epi8(plane[p], found);
      asm("" : "+x"(plane[p]));
    }
  }
};

// Of eight lookups, in 16 bits: sums of the lower two planes, and of the upper two, of the first 16 rows and of the last.
struct PairSums {
  U low[2], high[2];

  FEWBIT_INLINE void add(const PlaneSums& four, bool first) {
    const U weight = _mm256_set1_epi16(64 << 8 | 1);
    const U found[4] = {_mm256_maddubs_epi16(_mm256_unpacklo_epi8(four.plane[0], four.plane[1]), weight),
                        _mm256_maddubs_epi16(_mm256_unpackhi_epi8(four.plane[0], four.plane[1]), weight),
                        _mm256_maddubs_epi16(_mm256_unpacklo_epi8(four.plane[2], four.plane[3]), weight),
                        _mm256_maddubs_epi16(_mm256_unpackhi_epi8(four.plane[2], four.plane[3]), weight)};
    for (int i = 0; i < 2; i++) {
      low[i] = first ? found[i] : _mm256_add_epi16(low[i], found[i]);
      high[i] = first ? found[2 + i] : _mm256_add_epi16(high[i], found[2 + i]);
    }
  }

  FEWBIT_INLINE void add_to(U (&wide)[4]) const {
    const U weight = _mm256_set1_epi32(4096 << 16 | 1);
    for (int i = 0; i < 2; i++) {
      wide[2 * i] = _mm256_add_epi32(wide[2 * i], _mm256_madd_epi16(_mm256_unpacklo_epi16(low[i], high[i]), weight));
      wide[2 * i + 1] = _mm256_add_epi32(wide[2 * i + 1], _mm256_madd_epi16(_mm256_unpackhi_epi16(low[i], high[i]), weight));
    }
  }
};

// Eight lookups.
FEWBIT_INLINE void eight(const U (&index)[8], const uint8_t* entries, U (&wide)[4]) {
  PairSums pairs;
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    PlaneSums four;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) four.look_up(index[half * 4 + i], entries + (half * 4 + i) * kEntries, i == 0);
    pairs.add(four, half == 0);
  }
  pairs.add_to(wide);
}

template <int BITS>
struct Chunk24 {
  static FEWBIT_INLINE void add(const uint8_t* codes, int64_t apart, const uint8_t* entries, U (&wide)[4]) {
    const U half = _mm256_set1_epi8(15);
    for (int v = 0; v < BITS; v++, codes += 64, entries += 8 * kEntries) {
      U byte[4], index[8];
      gather_bytes(false, codes, apart, byte);
      for (int j = 0; j < 4; j++) {
        index[2 * j] = mask(byte[j], half);
        index[2 * j + 1] = mask(_mm256_srli_epi16(byte[j], 4), half);
      }
      eight(index, entries, wide);
    }
  }
};

// Codes of 2 + 1 bits: the upper bit of every other group of four columns is looked up by half a byte, to stand above the two
// lower ones of two groups. Bits 4 to 6 of an index do not count.
template <>
struct Chunk24<3> {
  static FEWBIT_INLINE void add(const uint8_t* codes, int64_t apart, const uint8_t* entries, U (&wide)[4]) {
    const U half = _mm256_set1_epi8(15), pairs = _mm256_set1_epi8(0x33);
    const U even = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
    const U odd = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
    U part[3][4];
    for (int v = 0; v < 3; v++) gather_bytes(false, codes + v * 64, apart, part[v]);
    for (int j = 0; j < 4; j++, entries += 8 * kEntries) {
      U index[8];
      for (int v = 0; v < 2; v++) {
        const U upper = mask(v ? _mm256_srli_epi16(part[2][j], 4) : part[2][j], half);
        index[4 * v] = combine(mask(part[v][j], pairs), _mm256_shuffle_epi8(even, upper));
        index[4 * v + 1] = _mm256_srli_epi16(index[4 * v], 4);
        index[4 * v + 2] = combine(mask(_mm256_srli_epi16(part[v][j], 2), pairs), _mm256_shuffle_epi8(odd, upper));
        index[4 * v + 3] = _mm256_srli_epi16(index[4 * v + 2], 4);
      }
      eight(index, entries, wide);
    }
  }
};

// Four row groups.
template <int BITS>
void rows24(const SegmentTask& task, const Strip& strip) {
  constexpr int64_t kChunk = lookups(BITS) * kEntries;
  Unsettled<4, 1> all(task, strip);
  const uint8_t* codes = strip.at(task, 0).codes;
  const int64_t apart = strip.codes_apart(task);
  const uint8_t* tables = tables_of(task, strip.token);
  for (int64_t segment = 0, chunk = 0; segment < task.segments; segment++) {
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    U wide[4];
    for (U& sum : wide) sum = _mm256_set1_epi32(static_cast<int32_t>(end - chunk) * lookups(BITS) * -kRaised24);
    for (; chunk < end; chunk++, codes += BITS * 64, tables += kChunk) {
      prefetch<BITS>(codes + kAheadApart);
      prefetch<BITS>(codes + apart + kAheadApart);
      Chunk24<BITS>::add(codes, apart, tables, wide);
    }
    F(&value)[4][1] = all.next(1);
    for (int t = 0; t < 4; t++) value[t][0] = convert(wide[t]);
  }
  all.finish_all(1);
}

template <int BITS>
void strips24(const SegmentTask& task, int64_t tile_begin, int64_t tokens) {
  for (int64_t token = 0; token < tokens; token++)
    strips_apart<4>(task.rows, tile_begin, token, 1, [&](const Strip& strip) { rows24<BITS>(task, strip); });
}

inline void product_tables_run(const SegmentTask& task, int64_t tile_begin, int64_t, int64_t tokens) {
  switch (task.bits) {
    case 1: return strips24<1>(task, tile_begin, tokens);
    case 2: return strips24<2>(task, tile_begin, tokens);
    case 3: return strips24<3>(task, tile_begin, tokens);
    case 4: return strips24<4>(task, tile_begin, tokens);
  }
}

}  // namespace
}  // namespace fewbit
