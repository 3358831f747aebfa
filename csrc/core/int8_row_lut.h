// SPDX-License-Identifier: Apache-2.0
// Rows with tables of their own, whose levels are bytes, times int8 activations: see fewbit_row_linear_int8.
// Included after an ISA's dot.h, which offers for this Shuffle and
//
//   kRowsBeside               rows beside kRowTokens tokens whose sums registers hold
//   totals_of(sum, out)       adds up the int32 lanes of each of four vectors
//   multiply_add(sum, u, x)   adds four products of bytes to each int32 of sum; u counts from kByteOrigin
//
// A vector holds chunks of row16 side by side, as many as it has 16 bytes. Each field of a code, masked, is an index into
// the row's 16 levels. Four chunks are whole vectors on every instruction set; the last, fewer ones are padded with zeros.
#pragma once

#include <string.h>

#include "core/byte_cells.h"
#include "core/inline.h"
#include "core/kernel.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int64_t kDecoded = 2048;  // levels of a row that are decoded at a time

// Rounds token `token` of x, or fills it with zeros where x has no such token; lays it out as the kernel reads it: (vectors
// of chunks, fields, tokens that are computed together, chunks of a vector, 16).
template <int BITS>
void round_columns(const Int8RowTask& task, const fewbit_input& x, int64_t token) {
  using Cells = ByteCells<BITS>;
  const int64_t within = token % task.together, apart = task.together * kBytes;
  auto* out = static_cast<int8_t*>(task.activations) + (token - within) * task.padded + within * kBytes;
  for (int64_t at = 0; at < task.padded / kBytes; at++) memset(out + at * apart, 0, kBytes);
  const bool exists = token < x.tokens;
  const float scale = exists ? scale_of(x, token, 0, task.columns) : 0.0f;
  int32_t sum = 0;
  for (int64_t chunk = 0; exists && chunk * Cells::kColumns < task.columns; chunk++) {
    int8_t* here = out + chunk / kBeside * Cells::kFields * apart + chunk % kBeside * 16;
    const int64_t first = chunk * Cells::kColumns, left = task.columns - first;
    for (int64_t begin = 0; begin < Cells::kColumns && begin < left; begin += 32) {
      float values[32] = {}, buffer[32];
      const int64_t count = left - begin < 32 ? left - begin : 32;
      memcpy(values, floats(x, token, first + begin, count, buffer), static_cast<size_t>(count) * sizeof(float));
      int8_t rounded[32];
      sum += round_chunks(values, scale, 128.0f, 1, rounded, 32);
      for (int half = 0; half < 2; half++) memcpy(here + (begin / 16 + half) * apart, rounded + half * 16, 16);
    }
  }
  task.x_scale[token] = scale;
  task.sums[token] = sum;
}

inline void int8_row_prepare(const Int8RowTask& task, const fewbit_input& x, int64_t token) {
  switch (task.bits) {
    case 1: return round_columns<1>(task, x, token);
    case 2: return round_columns<2>(task, x, token);
    case 3: return round_columns<3>(task, x, token);
    case 4: return round_columns<4>(task, x, token);
  }
}

// What rows [row, row + R) and a token are: `sums` of products over all columns, one a row.
template <int R>
FEWBIT_INLINE void put_rows(const Int8RowTask& task, int64_t row, int64_t token, const int32_t* sums) {
  const int32_t shift = (kByteOrigin - 128) * task.sums[token];
  const float scale = task.x_scale[token];
  float y[R];
  for (int r = 0; r < R; r++) y[r] = static_cast<float>(sums[r] + shift) * task.factor[row + r] * scale;
  if (task.bias)
    for (int r = 0; r < R; r++) y[r] += task.bias[row + r];
  const int64_t at = token * task.y_stride + row;
  if (task.y_dtype == FEWBIT_FLOAT32) memcpy(static_cast<float*>(task.y) + at, y, sizeof y);
  else
    for (int r = 0; r < R; r++) write_float(task.y, task.y_dtype, at + r, y[r]);
}

// Adds the products of four chunks of R rows, whose codes are `apart` bytes from row to row, and of M tokens to `sum`, C sums
// of each that fields take in turn. KEEP: the levels are written to `out`, (vectors, fields, R, kBytes).
template <int BITS, int R, int M, int C, bool KEEP>
FEWBIT_INLINE void add_coded(const Shuffle (&level)[R], const uint8_t* codes, int64_t apart, const uint8_t* x,
                             U (&sum)[C][M][R], uint8_t* out = nullptr) {
  using Cells = ByteCells<BITS>;
  for (int at = 0; at < kPart; at += kBytes) {
    Cells cells[R];
    for (int r = 0; r < R; r++) cells[r] = Cells(codes + r * apart + at);
#pragma GCC unroll 8
    for (int n = 0; n < Cells::kFields; n++) {
      U u[R];
      for (int r = 0; r < R; r++) {
        u[r] = level[r](cells[r].field(n));
        if constexpr (KEEP) store_lanes(out + r * kBytes, u[r]);
      }
      out += R * kBytes;
      for (int m = 0; m < M; m++, x += kBytes) {
        const U here = load_lanes(x);
        for (int r = 0; r < R; r++) sum[n % C][m][r] = multiply_add(sum[n % C][m][r], u[r], here);
      }
    }
  }
}

// Adds what registers hold of kRowTokens tokens times R rows to `totals`.
template <int R>
FEWBIT_INLINE void add_sums(const U (&sum)[1][kRowTokens][R], int32_t* totals) {
#pragma GCC unroll 4
  for (int i = 0; i < R * kRowTokens; i += 4) {
    int32_t four[4];
    totals_of(&sum[0][0][0] + i, four);
    for (int k = 0; k < 4; k++) totals[i + k] += four[k];
  }
}

// Adds the products of `vectors` vectors of levels that were kept to `totals`. A call of its own: what surrounds it would
// keep registers that its sums need.
template <int R>
FEWBIT_APART void add_decoded(const uint8_t* levels, const uint8_t* x, int64_t vectors, int32_t* totals) {
  U sum[1][kRowTokens][R];
  for (int m = 0; m < kRowTokens; m++)
    for (int r = 0; r < R; r++) sum[0][m][r] = repeat(0);
#pragma GCC unroll 1
  for (int64_t i = 0; i < vectors; i++, levels += R * kBytes) {
    U u[R];
    for (int r = 0; r < R; r++) u[r] = load_lanes(levels + r * kBytes);
    for (int m = 0; m < kRowTokens; m++, x += kBytes) {
      const U here = load_lanes(x);
      for (int r = 0; r < R; r++) sum[0][m][r] = multiply_add(sum[0][m][r], u[r], here);
    }
  }
  add_sums<R>(sum, totals);
}

// Rows [row, row + R) of one token.
template <int BITS, int R>
FEWBIT_INLINE void int8_row(const Int8RowTask& task, int64_t row) {
  using Cells = ByteCells<BITS>;
  constexpr int kChains = 4 / R;  // of sums, so that a product need not wait for the one before it
  constexpr int64_t kFour = Cells::kUnit * kPart, kColumns = kRowChunks * Cells::kColumns;  // bytes of four chunks
  const int64_t apart = task.chunks * Cells::kUnit * 16;
  const auto* x = static_cast<const uint8_t*>(task.activations);
  const uint8_t* codes = task.codes + row * apart;
  Shuffle level[R];
  U sum[kChains][1][R];
  for (int r = 0; r < R; r++) {
    level[r] = Shuffle(task.levels + (row + r) / task.table_rows * 16);
    for (int c = 0; c < kChains; c++) sum[c][0][r] = repeat(0);
  }
  const int64_t whole = apart / kFour, rest = apart % kFour;
  for (int64_t i = 0; i < whole; i++) {
    add_coded<BITS, R, 1, kChains, false>(level, codes + i * kFour, apart, x + i * kColumns, sum);
#pragma GCC unroll 16
    for (int64_t line = 0; R > 1 && line < R * kFour; line += 64)
      __builtin_prefetch(codes + kRowsAhead * apart + i * R * kFour + line, 0, 2);
  }
  if (rest) {
    const LastChunks<BITS, R> last(codes + whole * kFour, apart, rest);
    add_coded<BITS, R, 1, kChains, false>(level, last.bytes, kFour, x + whole * kColumns, sum);
  }
  U last[4];  // a copy: what has an address would lie in memory
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) last[i] = sum[i / R][0][i % R];
  int32_t totals[4];
  totals_of(last, totals);
  for (int c = 1; c < kChains; c++) totals[0] += totals[c];
  put_rows<R>(task, row, 0, totals);
}

// Rows [row, row + R) of all tokens, each part of a row decoded once.
template <int BITS, int R>
void int8_row_decoded(const Int8RowTask& task, int64_t row, int64_t tokens) {
  using Cells = ByteCells<BITS>;
  constexpr int64_t kFour = Cells::kUnit * kPart, kLevels = 4 * Cells::kColumns;  // bytes of four chunks; their levels
  alignas(64) uint8_t levels[R * kDecoded];
  int32_t totals[kRoundedTokens * R] = {};
  const int64_t apart = task.chunks * Cells::kUnit * 16, fours = task.padded / kLevels, whole = apart / kFour;
  const uint8_t* codes = task.codes + row * apart;
  Shuffle level[R];
  for (int r = 0; r < R; r++) level[r] = Shuffle(task.levels + (row + r) / task.table_rows * 16);
  for (int64_t first = 0; first < fours; first += kDecoded / kLevels) {
    const int64_t end = first + kDecoded / kLevels < fours ? first + kDecoded / kLevels : fours;
    const auto* x = static_cast<const uint8_t*>(task.activations) + first * kLevels * kRowTokens;
    U sum[1][kRowTokens][R];
    for (int m = 0; m < kRowTokens; m++)
      for (int r = 0; r < R; r++) sum[0][m][r] = repeat(0);
    uint8_t* out = levels;
    for (int64_t i = first; i < end && i < whole; i++, out += R * kLevels) {
      const uint8_t* here = x + (i - first) * kLevels * kRowTokens;
      add_coded<BITS, R, kRowTokens, 1, true>(level, codes + i * kFour, apart, here, sum, out);
#pragma GCC unroll 16
      for (int64_t line = 0; line < R * kFour; line += 64)
        __builtin_prefetch(codes + kRowsAhead * apart + i * R * kFour + line, 0, 2);
    }
    if (end > whole) {
      const LastChunks<BITS, R> last(codes + whole * kFour, apart, apart % kFour);
      const uint8_t* here = x + (whole - first) * kLevels * kRowTokens;
      add_coded<BITS, R, kRowTokens, 1, true>(level, last.bytes, kFour, here, sum, out);
    }
    add_sums<R>(sum, totals);
    for (int64_t token = kRowTokens; token < tokens; token += kRowTokens)
      add_decoded<R>(levels, x + token * task.padded, (end - first) * kLevels / kBytes, totals + token * R);
  }
  for (int64_t token = 0; token < tokens; token++) put_rows<R>(task, row, token, totals + token * R);
}

template <int BITS>
void int8_rows(const Int8RowTask& task, int64_t row, int64_t end, int64_t tokens) {
  if (task.together == 1) {
    for (; row + 4 <= end; row += 4) int8_row<BITS, 4>(task, row);
    for (; row < end; row++) int8_row<BITS, 1>(task, row);
  } else {
    for (; row + kRowsBeside <= end; row += kRowsBeside) int8_row_decoded<BITS, kRowsBeside>(task, row, tokens);
    for (; row < end; row++) int8_row_decoded<BITS, 1>(task, row, tokens);
  }
}

inline void int8_row_run(const Int8RowTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * 16, end = tile_end * 16 < task.rows ? tile_end * 16 : task.rows;
  switch (task.bits) {
    case 1: return int8_rows<1>(task, begin, end, tokens);
    case 2: return int8_rows<2>(task, begin, end, tokens);
    case 3: return int8_rows<3>(task, begin, end, tokens);
    case 4: return int8_rows<4>(task, begin, end, tokens);
  }
}

}  // namespace
}  // namespace fewbit
