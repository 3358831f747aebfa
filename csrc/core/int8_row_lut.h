// SPDX-License-Identifier: Apache-2.0
// Rows with tables of their own, whose levels are bytes, times int8 activations: see fewbit_row_linear_int8.
// Included after an ISA's dot.h, which offers for this Shuffle and
//
//   plus(a, b), total_of(a)   sums of int32, lane by lane and over all lanes
//   multiply_add(sum, u, x)   adds four products of bytes to each int32 of sum; u counts from kByteOrigin
//
// A vector holds chunks of row16 side by side, as many as it has 16 bytes. Each field of a code, masked, is an index into
// the row's 16 levels. Four chunks are whole vectors on every instruction set: the last, shorter ones are padded with zeros.
#pragma once

#include <string.h>

#include "core/inline.h"
#include "core/kernel.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int kBytes = 4 * kLanes, kBeside = kBytes / 16;  // of a vector; chunks in it
constexpr int kPart = 16 * kRowChunks;  // bytes of a part of four chunks
constexpr int64_t kAhead = 8;           // rows
constexpr int64_t kDecoded = 4096;      // levels of a row that are decoded at a time

template <int BITS>
struct ByteCells {
  static constexpr int kUnit = BITS == 3 ? 3 : 1;
  static constexpr int kFields = 8 * kUnit / BITS, kColumns = 16 * kFields;
  U part[kUnit];

  ByteCells() = default;
  explicit FEWBIT_INLINE ByteCells(const uint8_t* codes) {
    for (int p = 0; p < kUnit; p++) part[p] = load_lanes(codes + p * kPart);
  }

  // Codes of 16 columns of each chunk, one a byte.
  FEWBIT_INLINE U field(int n) const {
    constexpr uint32_t kMask = 0x01010101u * ((1u << BITS) - 1);
    const int bit = n * BITS, p = bit / 8, at = bit % 8;
    if (at + BITS <= 8) return mask(at ? shift_right(part[p], at) : part[p], kMask);
    const uint32_t low = 0x01010101u * ((1u << (8 - at)) - 1);
    return mask(select(low, shift_right(part[p], at), shift_left(part[p + (p + 1 < kUnit)], 8 - at)), kMask);
  }
};

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
      sum += round_chunk(values, scale, 128.0f, rounded);
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
  for (int r = 0; r < R; r++) {
    const int32_t value = sums[r] + (kByteOrigin - 128) * task.sums[token];
    float y = static_cast<float>(value) * task.factor[row + r] * task.x_scale[token];
    if (task.bias) y += task.bias[row + r];
    write_float(task.y, task.y_dtype, token * task.y_stride + row + r, y);
  }
}

// The end of R rows, whose last one to three chunks lie at `codes`, `rest` bytes each, as if they were four.
template <int BITS, int R>
struct LastChunks {
  static constexpr int kUnit = ByteCells<BITS>::kUnit;
  uint8_t bytes[R * kUnit * kPart] = {};

  FEWBIT_INLINE LastChunks(const uint8_t* codes, int64_t apart, int64_t rest) {
    for (int r = 0; r < R; r++)
      for (int p = 0; p < kUnit; p++)
        memcpy(bytes + (r * kUnit + p) * kPart, codes + r * apart + p * (rest / kUnit), static_cast<size_t>(rest / kUnit));
  }
};

// Rows [row, row + R) of one token.
template <int BITS, int R>
FEWBIT_INLINE void int8_row(const Int8RowTask& task, int64_t row) {
  using Cells = ByteCells<BITS>;
  constexpr int kChains = R >= 4 ? 1 : 4;          // of sums, so that a product need not wait for the one before it
  constexpr int64_t kFour = Cells::kUnit * kPart;  // bytes of four chunks
  const int64_t apart = task.chunks * Cells::kUnit * 16;
  const auto* x = static_cast<const uint8_t*>(task.activations);
  const uint8_t* codes = task.codes + row * apart;
  Shuffle level[R];
  U sum[R][kChains];
  for (int r = 0; r < R; r++) {
    level[r] = Shuffle(task.levels + (row + r) / task.table_rows * 16);
    for (int c = 0; c < kChains; c++) sum[r][c] = repeat(0);
  }
  const auto step = [&](const uint8_t* from, int64_t between) __attribute__((always_inline)) {
    Cells cells[R];
    for (int r = 0; r < R; r++) cells[r] = Cells(from + r * between);
#pragma GCC unroll 8
    for (int n = 0; n < Cells::kFields; n++, x += kBytes) {
      const U here = load_lanes(x);
      for (int r = 0; r < R; r++)
        sum[r][n % kChains] = multiply_add(sum[r][n % kChains], level[r](cells[r].field(n)), here);
    }
  };
  const int64_t whole = apart / kFour, rest = apart % kFour;
  for (int64_t i = 0; i < whole; i++) {
    for (int at = 0; at < kPart; at += kBytes) step(codes + i * kFour + at, apart);
    // Several rows side by side are no stream that the processor foresees: what is kAhead rows on, in order of memory.
#pragma GCC unroll 16
    for (int64_t line = 0; R > 1 && line < R * kFour; line += 64)
      __builtin_prefetch(codes + kAhead * apart + i * R * kFour + line, 0, 3);
  }
  if (rest) {
    const LastChunks<BITS, R> last(codes + whole * kFour, apart, rest);
    for (int at = 0; at < kPart; at += kBytes) step(last.bytes + at, kFour);
  }
  int32_t totals[R];
  for (int r = 0; r < R; r++) {
    for (int c = kChains / 2; c > 0; c /= 2)
      for (int i = 0; i < c; i++) sum[r][i] = plus(sum[r][i], sum[r][c + i]);
    totals[r] = total_of(sum[r][0]);
  }
  put_rows<R>(task, row, 0, totals);
}

// Decodes the chunks of R rows at `codes`, `apart` bytes from row to row, as many as a part of four: (vectors, fields, R,
// kBytes).
template <int BITS, int R>
FEWBIT_INLINE void decode_four(const Shuffle (&level)[R], const uint8_t* codes, int64_t apart, uint8_t* out) {
  using Cells = ByteCells<BITS>;
  for (int at = 0; at < kPart; at += kBytes, out += Cells::kFields * R * kBytes)
    for (int r = 0; r < R; r++) {
      const Cells cells(codes + r * apart + at);
#pragma GCC unroll 8
      for (int n = 0; n < Cells::kFields; n++) store_lanes(out + (n * R + r) * kBytes, level[r](cells.field(n)));
    }
}

// Adds the products of `vectors` vectors of R decoded rows and of kRowTokens tokens to `totals`.
template <int R>
FEWBIT_INLINE void add_products(const uint8_t* levels, const uint8_t* x, int64_t vectors, U (&sum)[kRowTokens][R]) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < vectors; i++, levels += R * kBytes, x += kRowTokens * kBytes) {
    U u[R];
    for (int r = 0; r < R; r++) u[r] = load_lanes(levels + r * kBytes);
    for (int m = 0; m < kRowTokens; m++) {
      const U here = load_lanes(x + m * kBytes);
      for (int r = 0; r < R; r++) sum[m][r] = multiply_add(sum[m][r], u[r], here);
    }
  }
}

// Rows [row, row + R) of all tokens, each part of a row decoded once.
template <int BITS, int R>
__attribute__((noinline)) void int8_row_decoded(const Int8RowTask& task, int64_t row, int64_t tokens) {
  using Cells = ByteCells<BITS>;
  constexpr int64_t kFour = Cells::kUnit * kPart, kLevels = 4 * Cells::kColumns;  // bytes of four chunks; their levels
  alignas(64) uint8_t levels[R * kDecoded];
  int32_t totals[kRoundedTokens][R] = {};
  const int64_t apart = task.chunks * Cells::kUnit * 16, fours = task.padded / kLevels, whole = apart / kFour;
  const uint8_t* codes = task.codes + row * apart;
  const auto* x = static_cast<const uint8_t*>(task.activations);
  Shuffle level[R];
  for (int r = 0; r < R; r++) level[r] = Shuffle(task.levels + (row + r) / task.table_rows * 16);
  for (int64_t first = 0; first < fours; first += kDecoded / kLevels) {
    const int64_t end = first + kDecoded / kLevels < fours ? first + kDecoded / kLevels : fours;
    for (int64_t token = 0; token < tokens; token += kRowTokens) {
      U sum[kRowTokens][R];
      for (int m = 0; m < kRowTokens; m++)
        for (int r = 0; r < R; r++) sum[m][r] = repeat(0);
      const uint8_t* here = x + token * task.padded + first * kLevels * kRowTokens;
      if (token == 0) {
        for (int64_t i = first; i < end; i++) {
          uint8_t* out = levels + (i - first) * R * kLevels;
          if (i < whole) {
            decode_four<BITS, R>(level, codes + i * kFour, apart, out);
          } else {
            const LastChunks<BITS, R> last(codes + whole * kFour, apart, apart % kFour);
            decode_four<BITS, R>(level, last.bytes, kFour, out);
          }
          for (int64_t line = 0; line < R * kFour; line += 64)
            __builtin_prefetch(codes + kAhead * apart + i * R * kFour + line, 0, 2);
          add_products<R>(out, here + (i - first) * kLevels * kRowTokens, kLevels / kBytes, sum);
        }
      } else {
        add_products<R>(levels, here, (end - first) * kLevels / kBytes, sum);
      }
      for (int m = 0; m < kRowTokens; m++)
        for (int r = 0; r < R; r++) totals[token + m][r] += total_of(sum[m][r]);
    }
  }
  for (int64_t token = 0; token < tokens; token++) put_rows<R>(task, row, token, totals[token]);
}

template <int BITS>
void int8_rows(const Int8RowTask& task, int64_t row, int64_t end, int64_t tokens) {
  constexpr int kBySide = BITS <= 2 ? 4 : 1;  // rows of one token: longer ones wait for memory, a stream by itself
  if (task.together == 1) {
    for (; row + kBySide <= end; row += kBySide) int8_row<BITS, kBySide>(task, row);
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
