// SPDX-License-Identifier: Apache-2.0
// Codes of 1 bit times one or two tokens by looking sums of activations up. Half a byte of tile16 holds one bit each of four columns, and what these four activations can add up to are 16
// numbers: a table that one vpshufb looks up for 32 rows. Products would take four masks, four products and four additions
// for as much.
//
// A sum plus kRaised lies in 0 .. 1023 and is two planes of 5 bits, so that eight of them, a chunk, still add up in bytes.
// Activations of a chunk are made into its tables, (4 bytes of a lane, 2 halves of a byte, 2 planes, 16 bytes).
#pragma once

#include "avx2/dot.h"

#include "core/few.h"
#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int kTableBytes = 4 * 2 * 2 * 16;  // of a chunk
constexpr int kRaised = 512;                 // >= 4 * 128
constexpr int64_t kTableRun = 8;             // chunks whose sums, at most 8 * 1020 each, add up in 16 bits

// A byte for each bit of four entries from `first` and, in the other half, from `first` + 8.
inline U bits_of_entries(int first) {
  const auto bits = [](int entry) { return (entry & 1) | (entry & 2) << 7 | (entry & 4) << 14 | (entry & 8) << 21; };
  const int a = first, b = first + 8;
  return _mm256_setr_epi32(bits(a), bits(a + 1), bits(a + 2), bits(a + 3), bits(b), bits(b + 1), bits(b + 2), bits(b + 3));
}

// The tables of 32 activations; in lanes: (byte / 2, half, plane, byte % 2, 16 bytes), as bytes16 is looked up.
inline void chunk_tables(const int8_t* x, uint8_t* out, bool lanes = false) {
  alignas(32) int8_t sorted[2][4][4];  // half, j, i
  store_lanes(reinterpret_cast<uint8_t*>(sorted), by_place(load_lanes(reinterpret_cast<const uint8_t*>(x))));
  const U first = bits_of_entries(0), second = bits_of_entries(4);
  for (int j = 0; j < 4; j++)
    for (int half = 0; half < 2; half++) {
      uint8_t* at = out + (lanes ? (j / 2 * 4 + half * 2) * 32 + j % 2 * 16 : (j * 2 + half) * 32);
      const U few = four(sorted[half][j]);
      U sum = _mm256_hadd_epi16(_mm256_maddubs_epi16(first, few), _mm256_maddubs_epi16(second, few));
      sum = _mm256_add_epi16(sum, _mm256_set1_epi16(kRaised));
      const U low = _mm256_and_si256(sum, _mm256_set1_epi16(31)), high = _mm256_srli_epi16(sum, 5);
      const U planes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(planes));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + (lanes ? 32 : 16)), _mm256_extracti128_si256(planes, 1));
    }
}

// The activations of a task as they were rounded, which lie behind their tables.
inline SegmentTask behind_tables(const SegmentTask& task) {
  SegmentTask behind = task;
  behind.activations = static_cast<uint8_t*>(task.activations) + task.together * task.chunks * kTableBytes;
  return behind;
}

// Rounds a token, of one or two, behind the tables of both; then makes its own.
inline void tables_token(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  auto* tables = static_cast<uint8_t*>(task.activations);
  const SegmentTask behind = behind_tables(task);
  round_token<int8_t>(behind, x, token);
  const int8_t* rounded = row_of<int8_t>(behind, token);
  for (int64_t c = 0; c < task.chunks; c++)
    chunk_tables(rounded + c * task.together * 32, tables + (c * task.together + token) * kTableBytes,
                 task.arranged && task.together == 1);
}

// Two tiles, `apart`, as bytes of the same columns: vector j holds byte j of each lane, of four row groups.
FEWBIT_INLINE void gather_bytes(bool arranged, const uint8_t* codes, int64_t apart, U (&byte)[4]) {
  if (arranged) {
    for (int j = 0; j < 4; j += 2) {
      const U first = load_lanes(codes + j * 16), second = load_lanes(codes + apart + j * 16);
      const U low = _mm256_unpacklo_epi64(first, second), high = _mm256_unpackhi_epi64(first, second);
      byte[j] = _mm256_permute2x128_si256(low, high, 0x20), byte[j + 1] = _mm256_permute2x128_si256(low, high, 0x31);
    }
    return;
  }
  U lanes[4];
  for (int t = 0; t < 4; t++) lanes[t] = by_place(load_lanes(codes + t / 2 * apart + t % 2 * 32));
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

// Adds what a chunk of four row groups, two tiles `apart`, brings to the sums of M tokens.
template <int M, bool arranged>
FEWBIT_INLINE void look_up(const uint8_t* codes, int64_t apart, const uint8_t* tables, TableSums (&sums)[M]) {
  const U half = _mm256_set1_epi8(15);
  U byte[4], low[M], high[M];
  gather_bytes(arranged, codes, apart, byte);
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

// Sums of 32 bits of four row groups x M tokens, less what `chunks` chunks raise them by.
template <int M>
struct WideSums {
  U sum[M][4];

  explicit FEWBIT_INLINE WideSums(int64_t chunks) {
    for (int m = 0; m < M; m++)
      for (int t = 0; t < 4; t++) sum[m][t] = _mm256_set1_epi32(static_cast<int32_t>(chunks) * -8 * kRaised);
  }
};

// Codes of 1 bit: four row groups x M tokens.
template <int M, bool arranged>
void one_bit(const SegmentTask& task, const Strip& strip) {
  Unsettled<4, M> all(task, strip);
  const uint8_t* codes = strip.at(task, 0).codes;
  const int64_t apart = strip.codes_apart(task);
  const auto* tables = static_cast<const uint8_t*>(task.activations);
  for (int64_t segment = 0, chunk = 0; segment < task.segments; segment++) {
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    WideSums<M> wide(end - chunk);
    while (chunk < end) {
      TableSums sums[M];
      const int64_t run = end - chunk < kTableRun ? end - chunk : kTableRun;
      for (int64_t c = 0; c < run; c++, codes += 64, tables += M * kTableBytes) {
        prefetch<1>(codes + kAheadApart);
        prefetch<1>(codes + apart + kAheadApart);
        look_up<M, arranged>(codes, apart, tables, sums);
      }
      for (int m = 0; m < M; m++) sums[m].flush(wide.sum[m]);
      chunk += run;
    }
    F(&value)[4][M] = all.next(1);
    for (int t = 0; t < 4; t++)
      for (int m = 0; m < M; m++) value[t][m] = convert(wide.sum[m][t]);
  }
  all.finish_all(1);
}

constexpr int64_t kLaneRun = 16;  // chunks of which 16 bits hold what half a vector sums up, at most 4 * 1020 of each

// The lower halves of two vectors, and the upper ones.
FEWBIT_INLINE U lower_halves(U a, U b) { return _mm256_permute2x128_si256(a, b, 0x20); }
FEWBIT_INLINE U upper_halves(U a, U b) { return _mm256_permute2x128_si256(a, b, 0x31); }

// Sums of 16 bits of a tile in bytes16, of which each half of a vector has every other byte's columns.
struct LaneSums : TableSums {
  // Of 16 rows: four of each row group in either half.
  FEWBIT_INLINE U joined() const { return _mm256_add_epi16(lower_halves(first, second), upper_halves(first, second)); }
};

// Adds what N chunks, at most two, of two tiles `apart` bring, nothing being moved.
template <int N>
FEWBIT_INLINE void look_up_lanes(const uint8_t* codes, int64_t apart, const uint8_t* tables, LaneSums (&sums)[2]) {
  const U half = _mm256_set1_epi8(15);
  U low[2], high[2];
  for (int t = 0; t < 2; t++) low[t] = high[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int v = 0; v < 2 * N; v++) {
    U bytes[2];
    for (int t = 0; t < 2; t++) bytes[t] = load_lanes(codes + t * apart + v * 32);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const uint8_t* here = tables + (v * 2 + h) * 64;
      const U few = load_lanes(here), many = load_lanes(here + 32);
      for (int t = 0; t < 2; t++) {
        const U index = mask(h ? _mm256_srli_epi16(bytes[t], 4) : bytes[t], half);
        low[t] = _mm256_add_epi8(low[t], _mm256_shuffle_epi8(few, index));
        high[t] = _mm256_add_epi8(high[t], _mm256_shuffle_epi8(many, index));
        asm("" : "+x"(low[t]), "+x"(high[t]));  // see look_up
      }
    }
  }
  for (int t = 0; t < 2; t++) sums[t].add(low[t], high[t]);
}

// Adds what `chunks` chunks bring, and goes on behind them.
FEWBIT_INLINE void look_up_run(const uint8_t*& codes, int64_t apart, const uint8_t*& tables, int64_t chunks,
                               LaneSums (&sums)[2]) {
  for (; chunks > 1; chunks -= 2, codes += 2 * 64, tables += 2 * kTableBytes) {
    prefetch<2>(codes + kAheadApart);
    prefetch<2>(codes + apart + kAheadApart);
    look_up_lanes<2>(codes, apart, tables, sums);
  }
  if (chunks == 0) return;
  prefetch<1>(codes + kAheadApart);
  prefetch<1>(codes + apart + kAheadApart);
  look_up_lanes<1>(codes, apart, tables, sums);
  codes += 64, tables += kTableBytes;
}

// Codes of 1 bit in bytes16: four row groups, one token.
inline void one_bit_lanes(const SegmentTask& task, const Strip& strip) {
  Unsettled<4, 1> all(task, strip);
  const uint8_t* codes = strip.at(task, 0).codes;
  const int64_t apart = strip.codes_apart(task);
  const auto* tables = static_cast<const uint8_t*>(task.activations);
  const U above = _mm256_set1_epi16(0x4b00);
  for (int64_t segment = 0, chunk = 0; segment < task.segments; segment++) {
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    if (task.segment_chunks <= kTableRun) {  // as floats at once: words below 0x4b00 are floats from 2^23 on
      LaneSums sums[2];
      const F raised = broadcast(static_cast<float>((1 << 23) + (end - chunk) * 8 * kRaised));
      look_up_run(codes, apart, tables, end - chunk, sums);
      chunk = end;
      F(&value)[4][1] = all.next(1);
      for (int t = 0; t < 2; t++) {
        const U joined = sums[t].joined();
        value[2 * t][0] = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(joined, above)), raised);
        value[2 * t + 1][0] = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(joined, above)), raised);
      }
      continue;
    }
    U wide[2][4] = {};  // rows 0-3, 8-11, 4-7 and 12-15 of a tile
    const U raised = _mm256_set1_epi32(static_cast<int32_t>(end - chunk) * -8 * kRaised);
    for (int64_t run; chunk < end; chunk += run) {
      LaneSums sums[2];
      run = end - chunk < kLaneRun ? end - chunk : kLaneRun;
      look_up_run(codes, apart, tables, run, sums);
      for (int t = 0; t < 2; t++) sums[t].flush(wide[t]);
    }
    F(&value)[4][1] = all.next(1);
    for (int t = 0; t < 4; t++) {
      const U a = wide[t / 2][t % 2], b = wide[t / 2][t % 2 + 2];
      value[t][0] = convert(_mm256_add_epi32(raised, _mm256_add_epi32(lower_halves(a, b), upper_halves(a, b))));
    }
  }
  all.finish_all(1);
}

inline void bit_tables_run(const SegmentTask& task, int64_t tile_begin, int64_t, int64_t tokens) {
  strips_apart<4>(task.rows, tile_begin, 0, tokens, [&](const Strip& strip) {
    if (task.together == 1) task.arranged ? one_bit_lanes(task, strip) : one_bit<1, false>(task, strip);
    else task.arranged ? one_bit<2, true>(task, strip) : one_bit<2, false>(task, strip);
  });
}

}  // namespace
}  // namespace fewbit
