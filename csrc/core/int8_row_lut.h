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
// of chunks, fields, chunks of a vector, 16).
template <int BITS>
void round_columns(const Int8RowTask& task, const fewbit_input& x, int64_t token) {
  using Cells = ByteCells<BITS>;
  auto* out = static_cast<int8_t*>(task.activations) + token * task.padded;
  memset(out, 0, static_cast<size_t>(task.padded));
  const bool exists = token < x.tokens;
  const float scale = exists ? scale_of(x, token, 0, task.columns) : 0.0f;
  int32_t sum = 0;
  for (int64_t chunk = 0; exists && chunk * Cells::kColumns < task.columns; chunk++) {
    int8_t* here = out + (chunk / kBeside * Cells::kFields * kBeside + chunk % kBeside) * 16;
    const int64_t first = chunk * Cells::kColumns, left = task.columns - first;
    for (int64_t begin = 0; begin < Cells::kColumns && begin < left; begin += 32) {
      float values[32] = {}, buffer[32];
      const int64_t count = left - begin < 32 ? left - begin : 32;
      memcpy(values, floats(x, token, first + begin, count, buffer), static_cast<size_t>(count) * sizeof(float));
      int8_t rounded[32];
      sum += round_chunk(values, scale, 128.0f, rounded);
      for (int half = 0; half < 2; half++) memcpy(here + (begin / 16 + half) * kBytes, rounded + half * 16, 16);
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

// Rows [row, row + R) of M tokens from `token`, of which `tokens` exist: what is loaded serves R * M products.
template <int BITS, int R, int M>
FEWBIT_INLINE void int8_row(const Int8RowTask& task, int64_t row, int64_t token, int64_t tokens) {
  using Cells = ByteCells<BITS>;
  constexpr int kChains = R * M >= 4 ? 1 : 4;  // of sums, so that a product need not wait for the one before it
  constexpr int64_t kFour = Cells::kUnit * kPart;     // bytes of four chunks
  const int64_t apart = task.chunks * Cells::kUnit * 16;
  const auto* x = static_cast<const uint8_t*>(task.activations) + token * task.padded;
  const uint8_t* codes = task.codes + row * apart;
  Shuffle level[R];
  U sum[R][M][kChains];
  for (int r = 0; r < R; r++) {
    level[r] = Shuffle(task.levels + (row + r) / task.table_rows * 16);
    for (int m = 0; m < M; m++)
      for (int c = 0; c < kChains; c++) sum[r][m][c] = repeat(0);
  }
  const auto step = [&](const uint8_t* from, int64_t between) __attribute__((always_inline)) {
    Cells cells[R];
    for (int r = 0; r < R; r++) cells[r] = Cells(from + r * between);
#pragma GCC unroll 8
    for (int n = 0; n < Cells::kFields; n++, x += kBytes) {
      U u[R];
      for (int r = 0; r < R; r++) u[r] = level[r](cells[r].field(n));
      for (int m = 0; m < M; m++) {
        const U here = load_lanes(x + m * task.padded);
        for (int r = 0; r < R; r++) sum[r][m][n % kChains] = multiply_add(sum[r][m][n % kChains], u[r], here);
      }
    }
  };
  const int64_t whole = apart / kFour, rest = apart % kFour;
  for (int64_t i = 0; i < whole; i++) {
    for (int at = 0; at < kPart; at += kBytes) step(codes + i * kFour + at, apart);
    // Several rows side by side are no stream that the processor foresees: what is kAhead rows on, in order of memory.
#pragma GCC unroll 16
    for (int64_t line = 0; R > 1 && line < R * kFour; line += 64)
      __builtin_prefetch(codes + kAhead * apart + i * R * kFour + line, 0, M == 1 ? 3 : 2);
  }
  if (rest) {
    uint8_t last[R * kFour] = {};
    for (int i = 0; i < R * Cells::kUnit; i++) {
      const int64_t r = i / Cells::kUnit, p = i % Cells::kUnit, each = rest / Cells::kUnit;
      memcpy(last + i * kPart, codes + r * apart + whole * kFour + p * each, static_cast<size_t>(each));
    }
    for (int at = 0; at < kPart; at += kBytes) step(last + at, kFour);
  }
  for (int m = 0; m < M && m < tokens; m++)
    for (int r = 0; r < R; r++) {
      for (int c = kChains / 2; c > 0; c /= 2)
        for (int i = 0; i < c; i++) sum[r][m][i] = plus(sum[r][m][i], sum[r][m][c + i]);
      const int32_t value = total_of(sum[r][m][0]) + (kByteOrigin - 128) * task.sums[token + m];
      float y = static_cast<float>(value) * task.factor[row + r] * task.x_scale[token + m];
      if (task.bias) y += task.bias[row + r];
      write_float(task.y, task.y_dtype, (token + m) * task.y_stride + row + r, y);
    }
}

template <int BITS, int R, int M>
FEWBIT_INLINE void int8_rows_of(const Int8RowTask& task, int64_t row, int64_t end, int64_t token, int64_t tokens) {
  for (; row + R <= end; row += R) int8_row<BITS, R, M>(task, row, token, tokens);
  for (; row < end; row++) int8_row<BITS, 1, M>(task, row, token, tokens);
}

template <int BITS>
void int8_rows(const Int8RowTask& task, int64_t begin, int64_t end, int64_t tokens) {
  constexpr int kBySide = BITS <= 2 ? 4 : 1;  // rows of one token: longer ones wait for memory, a stream by itself
  for (int64_t token = 0; token < tokens; token += task.together) {
    if (task.together == 1) int8_rows_of<BITS, kBySide, 1>(task, begin, end, token, 1);
    else int8_rows_of<BITS, 2, kRowTokens>(task, begin, end, token, tokens - token);
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
