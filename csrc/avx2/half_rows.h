// SPDX-License-Identifier: Apache-2.0
// Rows whose tables are up to 16 levels of float16, under one scale each. Levels are looked up as two planes of bytes, kept as
// float16 for all tokens, and widened where they are multiplied: vcvtph2ps from memory takes no more than a load.
#pragma once

#include "avx2/simd.h"

#include "core/byte_cells.h"
#include "core/row_lut.h"
#include "core/word.h"

namespace fewbit {
namespace {

constexpr int64_t kHeld = 512;  // columns whose levels are kept
constexpr int kHalfRows = 4;    // rows beside each other: two sums each are chains enough, and they share activations

// Levels, byte by byte, in both halves.
template <int BITS>
struct HalfLevels {
  U low, high;

  HalfLevels() = default;
  FEWBIT_INLINE HalfLevels(const RowTask& task, int64_t row) {
    const uint16_t* half = static_cast<const uint16_t*>(task.table) + (row / task.table_rows << BITS);
    __m128i first, last;
    if constexpr (BITS == 1) first = _mm_set1_epi32(word_at<int32_t>(half));
    else if constexpr (BITS == 2) first = _mm_set1_epi64x(word_at<int64_t>(half));
    else first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half));
    if constexpr (BITS == 4) last = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + 8));
    else last = first;
    const __m128i byte = _mm_set1_epi16(255);
    low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte)));
    high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8)));
  }

  // Writes those of 16 columns of two chunks: (2 groups of 8 columns, 2 chunks, 8).
  FEWBIT_INLINE void operator()(U codes, uint16_t* out) const {
    const U a = _mm256_shuffle_epi8(low, codes), b = _mm256_shuffle_epi8(high, codes);
    store_lanes(reinterpret_cast<uint8_t*>(out), _mm256_unpacklo_epi8(a, b));
    store_lanes(reinterpret_cast<uint8_t*>(out + 16), _mm256_unpackhi_epi8(a, b));
  }
};

// Writes the levels of fours of chunks of R rows, kHeld apart: (pairs of chunks, groups of 8 columns, 2 chunks, 8).
template <int BITS, int R>
FEWBIT_INLINE void hold_rows(const HalfLevels<BITS> (&table)[R], const uint8_t* codes, int64_t apart, int64_t fours,
                             uint16_t* out) {
  using Cells = ByteCells<BITS>;
  for (int64_t i = 0; i < fours; i++, codes += Cells::kUnit * kPart, out += 4 * Cells::kColumns)
    for (int r = 0; r < R; r++)
      for (int at = 0; at < kPart; at += kBytes) {
        const Cells cells(codes + r * apart + at);
        uint16_t* here = out + r * kHeld + at / 16 * Cells::kColumns;
#pragma GCC unroll 8
        for (int n = 0; n < Cells::kFields; n++) table[r](cells.field(n), here + n * 32);
      }
}

// Adds the products of chunks of R rows and one token to `total`, two sums a row that groups of 8 columns take in turn.
template <int BITS, int R>
FEWBIT_INLINE void add_held(const uint16_t* levels, const float* x, int64_t chunks, F (&total)[R][2]) {
  constexpr int kColumns = ByteCells<BITS>::kColumns;
  F sum[R][2];
  for (int r = 0; r < R; r++) sum[r][0] = total[r][0], sum[r][1] = total[r][1];
  for (int64_t i = 0; i < chunks; i++) {
    const uint16_t* here = levels + i / 2 * 2 * kColumns + i % 2 * 8;
    for (int k = 0; k < kColumns; k += 16, x += 16, here += 32)
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) {
        const F eight = load(x + c * 8);
        for (int r = 0; r < R; r++) sum[r][c] = fma(load_half(here + r * kHeld + c * 16), eight, sum[r][c]);
      }
  }
  for (int r = 0; r < R; r++) total[r][0] = sum[r][0], total[r][1] = sum[r][1];
}

// R rows of all tokens.
template <int BITS, int R>
void half_rows(const RowTask& task, int64_t row) {
  using Cells = ByteCells<BITS>;
  constexpr int64_t kChunk = Cells::kUnit * 16, kColumns = Cells::kColumns;  // bytes and columns of a chunk
  const int64_t apart = task.chunks * kChunk, fours = task.chunks / 4 * 4;
  const uint8_t* codes = task.codes + row * apart;
  alignas(32) uint16_t levels[R * kHeld];
  HalfLevels<BITS> table[R];
  F total[kRowPanel][R][2];
  for (int r = 0; r < R; r++) table[r] = HalfLevels<BITS>(task, row + r);
  for (int64_t token = 0; token < task.tokens; token++)
    for (auto& sums : total[token]) sums[0] = sums[1] = broadcast(0.0f);
  for (int64_t chunk = 0, chunks; chunk < task.chunks; chunk += chunks, codes += chunks * kChunk) {
    const int64_t whole = fours - chunk < kHeld / kColumns ? fours - chunk : kHeld / kColumns;
    chunks = whole ? whole : task.chunks - chunk;
    if (whole) hold_rows<BITS, R>(table, codes, apart, whole / 4, levels);
    else hold_rows<BITS, R>(table, LastChunks<BITS, R>(codes, apart, chunks * kChunk).bytes, 4 * kChunk, 1, levels);
    // Rows side by side are no stream that the processor foresees: what follows them, in order of memory.
    const uint8_t* next = codes + R * apart + (R - 1) * chunk * kChunk;
    for (int64_t line = 0; line < R * chunks * kChunk; line += 64) __builtin_prefetch(next + line, 0, 3);
    for (int64_t token = 0; token < task.tokens; token++)
      add_held<BITS, R>(levels, task.panel + (token * task.chunks + chunk) * kColumns, chunks, total[token]);
  }
  for (int64_t token = 0; token < task.tokens; token++)
    for (int r = 0; r < R; r++) {
      const float sum = total_of(add(total[token][r][0], total[token][r][1])) * task.scale[row + r];
      write_float(task.y, task.y_dtype, token * task.y_stride + row + r, task.bias ? sum + task.bias[row + r] : sum);
    }
}

template <int BITS>
void half_rows_of(const RowTask& task, int64_t row, int64_t end) {
  for (; row + kHalfRows <= end; row += kHalfRows) half_rows<BITS, kHalfRows>(task, row);
  for (; row < end; row++) half_rows<BITS, 1>(task, row);
}

}  // namespace
}  // namespace fewbit
