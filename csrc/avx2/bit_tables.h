// SPDX-License-Identifier: Apache-2.0
// Codes of 1 bit times one or two tokens, by looking sums of activations up. Half a byte of tile16 holds one bit each of
// four columns, and what these four activations can add up to are 16 numbers: a table that one vpshufb looks up for 32
// rows. Products would take four masks, four products and four additions for as much.
//
// A sum plus kRaised lies in 0 .. 1023 and is two planes of 5 bits, so that eight of them, a chunk, still add up in bytes.
// Activations of a chunk are made into its tables, (4 bytes of a lane, 2 halves of a byte, 2 planes, 16 bytes).
#pragma once

#include "avx2/simd.h"

#include "core/few.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int kTableBytes = 4 * 2 * 2 * 16;  // of a chunk
constexpr int kRaised = 512;                 // >= 4 * 128
constexpr int64_t kTableRun = 8;             // chunks whose sums, at most 8 * 1020 each, add up in 16 bits

// The tables of 32 activations.
inline void chunk_tables(const int8_t* x, uint8_t* out) {
  const U index = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  U taken[4];  // entries that hold the activation of bit i
  for (int i = 0; i < 4; i++) {
    const U bit = _mm256_set1_epi16(static_cast<int16_t>(1 << i));
    taken[i] = _mm256_cmpeq_epi16(mask(index, bit), bit);
  }
  for (int j = 0; j < 4; j++)
    for (int half = 0; half < 2; half++, out += 32) {
      U sum = _mm256_set1_epi16(kRaised);
      for (int i = 0; i < 4; i++)
        sum = _mm256_add_epi16(sum, _mm256_and_si256(taken[i], _mm256_set1_epi16(x[16 * half + 4 * i + j])));
      const U low = _mm256_and_si256(sum, _mm256_set1_epi16(31)), high = _mm256_srli_epi16(sum, 5);
      store_lanes(out, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8));
    }
}

// Rounds a token, of one or two, behind the tables of both; then makes its own.
inline void tables_token(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  auto* tables = static_cast<uint8_t*>(task.activations);
  SegmentTask behind = task;
  behind.activations = tables + task.together * task.chunks * kTableBytes;
  round_token<int8_t>(behind, x, token);
  const int8_t* rounded = row_of<int8_t>(behind, token);
  for (int64_t c = 0; c < task.chunks; c++)
    chunk_tables(rounded + c * task.together * 32, tables + (c * task.together + token) * kTableBytes);
}

// Two tiles, `apart`, as bytes of the same columns: vector j holds byte j of each lane, of four row groups.
FEWBIT_INLINE void gather_bytes(const uint8_t* codes, int64_t apart, U (&byte)[4]) {
  const U order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  U lanes[4];
  for (int t = 0; t < 4; t++) lanes[t] = _mm256_shuffle_epi8(load_lanes(codes + t / 2 * apart + t % 2 * 32), order);
  const U a = _mm256_unpacklo_epi32(lanes[0], lanes[1]), b = _mm256_unpackhi_epi32(lanes[0], lanes[1]);
  const U c = _mm256_unpacklo_epi32(lanes[2], lanes[3]), d = _mm256_unpackhi_epi32(lanes[2], lanes[3]);
  byte[0] = _mm256_unpacklo_epi64(a, c), byte[1] = _mm256_unpackhi_epi64(a, c);
  byte[2] = _mm256_unpacklo_epi64(b, d), byte[3] = _mm256_unpackhi_epi64(b, d);
}

inline U table_at(const uint8_t* bytes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// Sums of 16 bits of four row groups and one token: rows of the first two, and of the last two.
struct TableSums {
  U first = _mm256_setzero_si256(), second = _mm256_setzero_si256();

  // Adds those of a chunk, given as planes.
  FEWBIT_INLINE void add(U low, U high) {
    const U weight = _mm256_set1_epi16(32 << 8 | 1);
    first = _mm256_add_epi16(first, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), weight));
    second = _mm256_add_epi16(second, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), weight));
    asm("" : "+x"(first), "+x"(second));
  }

  // Adds them to sums of 32 bits.
  FEWBIT_INLINE void flush(U (&wide)[4]) const {
    const U zero = _mm256_setzero_si256();
    wide[0] = _mm256_add_epi32(wide[0], _mm256_unpacklo_epi16(first, zero));
    wide[1] = _mm256_add_epi32(wide[1], _mm256_unpackhi_epi16(first, zero));
    wide[2] = _mm256_add_epi32(wide[2], _mm256_unpacklo_epi16(second, zero));
    wide[3] = _mm256_add_epi32(wide[3], _mm256_unpackhi_epi16(second, zero));
  }
};

// Four row groups x M tokens.
template <int M>
void look_up(const SegmentTask& task, const SegmentStrip& strip) {
  Unsettled<4, M> all(task, strip);
  const uint8_t* codes = Group(task, strip.at(0)).codes;
  const int64_t apart = strip.groups > 2 ? task.chunks * 64 : 0;  // a tile alone is taken for both
  const auto* tables = static_cast<const uint8_t*>(task.activations);
  const int64_t ahead = fetched_ahead(task, 2);
  const U half = _mm256_set1_epi8(15);
  for (int64_t segment = 0, chunk = 0; segment < task.segments; segment++) {
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    U wide[M][4];
    for (int m = 0; m < M; m++)
      for (int t = 0; t < 4; t++) wide[m][t] = _mm256_set1_epi32(static_cast<int32_t>(end - chunk) * -8 * kRaised);
    while (chunk < end) {
      TableSums sums[M];
      const int64_t run = end - chunk < kTableRun ? end - chunk : kTableRun;
      for (int64_t c = 0; c < run; c++, codes += 64, tables += M * kTableBytes) {
        U byte[4], low[M], high[M];
        prefetch<1>(codes + ahead);
        prefetch<1>(codes + apart + ahead);
        gather_bytes(codes, apart, byte);
        for (int m = 0; m < M; m++) low[m] = high[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const U index[2] = {mask(byte[j], half), mask(_mm256_srli_epi16(byte[j], 4), half)};
          for (int m = 0; m < M; m++)
            for (int h = 0; h < 2; h++) {
              const uint8_t* here = tables + m * kTableBytes + (j * 2 + h) * 32;
              low[m] = _mm256_add_epi8(low[m], _mm256_shuffle_epi8(table_at(here), index[h]));
              high[m] = _mm256_add_epi8(high[m], _mm256_shuffle_epi8(table_at(here + 16), index[h]));
              asm("" : "+x"(low[m]), "+x"(high[m]));  // GCC would delay the additions, and keep what it looked up in memory
            }
        }
        for (int m = 0; m < M; m++) sums[m].add(low[m], high[m]);
      }
      for (int m = 0; m < M; m++) sums[m].flush(wide[m]);
      chunk += run;
    }
    F(&value)[4][M] = all.next(1);
    for (int t = 0; t < 4; t++)
      for (int m = 0; m < M; m++) value[t][m] = convert(wide[m][t]);
  }
  all.finish_all(1);
}

inline void bit_tables_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t end = tile_end * kGroupsPerTile;
  for (int64_t group = tile_begin * kGroupsPerTile; group < end; group += 4) {
    const SegmentStrip strip = {group, end - group, 0, tokens};
    task.together == 1 ? look_up<1>(task, strip) : look_up<2>(task, strip);
  }
}

}  // namespace
}  // namespace fewbit
