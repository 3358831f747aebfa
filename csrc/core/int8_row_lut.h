// SPDX-License-Identifier: Apache-2.0
// Rows with tables of their own, whose levels are integers of 16 bits, times int8 activations: see fewbit_row_linear_int8.
// Included after an ISA's dot.h, which offers for this Shuffle and
//
//   load_apart(p, apart)      16 bytes from p, from p + apart, and so on
//   total_of(a, b)            the sum of all their int32
//   multiply_add(sum, u, x)   adds four products of bytes to each int32 of sum; u counts from kByteOrigin
//
// A vector holds chunks of row16 side by side, as many as it has 16 bytes. Each field of a code, masked, is an index into
// the row's 16 levels, of which one lookup gives the low bytes, another the high ones.
#pragma once

#include <string.h>

#include "core/inline.h"
#include "core/kernel.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int kBytes = 4 * kLanes, kBeside = kBytes / 16;  // of a vector; chunks in it

template <int BITS>
struct ByteCells {
  static constexpr int kUnit = BITS == 3 ? 3 : 1;
  static constexpr int kFields = 8 * kUnit / BITS, kColumns = 16 * kFields;
  U part[kUnit];

  // kBeside chunks, of which `exist` do.
  FEWBIT_INLINE ByteCells(const uint8_t* codes, int64_t exist) {
    uint8_t bytes[kUnit * kBytes];
    if (exist < kBeside) {
      memset(bytes, 0, sizeof bytes);
      memcpy(bytes, codes, static_cast<size_t>(exist * kUnit * 16));
      codes = bytes;
    }
    for (int p = 0; p < kUnit; p++) part[p] = kUnit == 1 ? load_lanes(codes) : load_apart(codes + p * 16, kUnit * 16);
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

// Row `row` of M tokens from `token`, of which `tokens` exist.
template <int BITS, int M>
FEWBIT_INLINE void int8_row(const Int8RowTask& task, int64_t row, int64_t token, int64_t tokens) {
  using Cells = ByteCells<BITS>;
  constexpr int kChains = 2;
  const uint8_t* planes = task.levels + row / task.table_rows * 32;
  const Shuffle level[2] = {Shuffle(planes), Shuffle(planes + 16)};  // low and high bytes
  const uint8_t* codes = task.codes + row * task.chunks * Cells::kUnit * 16;
  const auto* x = static_cast<const uint8_t*>(task.activations) + token * task.padded;
  U sum[M][2][kChains];
  for (int m = 0; m < M; m++)
    for (int p = 0; p < 2; p++)
      for (int c = 0; c < kChains; c++) sum[m][p][c] = repeat(0);
  for (int64_t left = task.chunks; left > 0; left -= kBeside, codes += kBeside * Cells::kUnit * 16) {
    const Cells cells(codes, left);
#pragma GCC unroll 8
    for (int n = 0; n < Cells::kFields; n++, x += kBytes) {
      const U index = cells.field(n), u[2] = {level[0](index), level[1](index)};
      for (int m = 0; m < M; m++) {
        const U here = load_lanes(x + m * task.padded);
        for (int p = 0; p < 2; p++) sum[m][p][n % kChains] = multiply_add(sum[m][p][n % kChains], u[p], here);
      }
    }
  }
  for (int m = 0; m < M; m++) {
    if (m >= tokens) break;
    const int32_t all = task.sums[token + m];
    const int32_t low = total_of(sum[m][0][0], sum[m][0][1]) + kByteOrigin * all;
    const int32_t high = total_of(sum[m][1][0], sum[m][1][1]) + (kByteOrigin - 128) * all;
    const float value = __builtin_fmaf(static_cast<float>(high), 256.0f, static_cast<float>(low));
    float y = value * task.factor[row] * task.x_scale[token + m];
    if (task.bias) y += task.bias[row];
    write_float(task.y, task.y_dtype, (token + m) * task.y_stride + row, y);
  }
}

template <int BITS>
void int8_rows(const Int8RowTask& task, int64_t begin, int64_t end, int64_t tokens) {
  for (int64_t token = 0; token < tokens; token += task.together)
    for (int64_t row = begin; row < end; row++) {
      if (task.together == 1) int8_row<BITS, 1>(task, row, token, 1);
      else int8_row<BITS, kRowTokens>(task, row, token, tokens - token);
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
