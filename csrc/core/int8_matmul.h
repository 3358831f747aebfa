// SPDX-License-Identifier: Apache-2.0
// The loops of fewbit_int8_matmul, over the vector type of the file that includes this, after that file's simd.h and its
//
//   dot(sum, a, b)    four-byte lanes, sum + a[0] b[0] + a[1] b[1], a lane of a and b being two int16_t
//   kVectors          vectors of columns beside kMatmulRows rows; as many lanes as divide kStripColumns
//
// Codes less their zeros are at most 255 in magnitude, so words hold them and int32 the sums of 2^15 products, exactly.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/dtypes.h"
#include "core/inline.h"
#include "core/matmul.h"

namespace fewbit {
namespace {

constexpr int kTogether = kVectors * kLanes;
static_assert(kStripColumns % kTogether == 0, "strips are whole");

// As in rounding.h.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRoundBits = 0x4b400000, kInfinityBits = 0x7f800000;

// `count` numbers, `step` apart: clamp(round_half_even(x / scale + zero), 0, 2^bits - 1) - zero. Returns `factor`, or NaN
// where one of them is not finite.
inline float round_line(const fewbit_operand& grid, const float* x, int64_t step, int64_t count, float factor,
                        float* gathered, int16_t* out) {
  if (step != 1) {
    for (int64_t k = 0; k < count; k++) gathered[k] = x[k * step];
    x = gathered;
  }
  const float scale = grid.scale, zero = static_cast<float>(grid.zero);
  const int32_t top = kRoundBits + (1 << grid.bits) - 1, centre = kRoundBits + grid.zero;
  int32_t most = 0;
  for (int64_t k = 0; k < count; k++) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x[k]) & 0x7fffffffu);
    most = most > magnitude ? most : magnitude;
    int32_t bits = static_cast<int32_t>(bits_of(x[k] / scale + zero + kRound));
    bits = bits > kRoundBits ? bits : kRoundBits;
    bits = bits < top ? bits : top;
    out[k] = static_cast<int16_t>(bits - centre);
  }
  return most >= kInfinityBits ? float_of(0x7fc00000u) : factor;
}

// Strips of b, line by line as they lie in memory; columns and an inner neighbour that do not exist are zeros.
inline void matmul_pack(const MatmulTask& task) {
  const fewbit_operand& b = task.b;
  const int64_t padded = task.strips * kStripColumns, strip = task.pairs * kStripColumns * 2;
  for (int64_t j = 0; j < padded; j++) task.factor[j] = 1;
  if (task.columns % kStripColumns || task.inner % 2)
    memset(task.right, 0, static_cast<size_t>(task.strips * strip) * sizeof(int16_t));
  const auto* data = static_cast<const float*>(b.data);
  if (b.stride_row == 1) {  // a column after the other
    task.lines[2 * task.pairs - 1] = 0;
    for (int64_t j = 0; j < task.columns; j++) {
      const float* x = data + j * b.stride_column;
      task.factor[j] = round_line(b, x, 1, task.inner, 1, task.gathered, task.lines);
      int16_t* out = task.right + j / kStripColumns * strip + j % kStripColumns * 2;
      for (int64_t p = 0; p < task.pairs; p++) memcpy(out + p * kStripColumns * 2, task.lines + 2 * p, 4);
    }
    return;
  }
  int16_t *first = task.lines, *second = task.lines + padded;
  for (int64_t k = 0; k < task.inner; k += 2) {
    for (int64_t i = k; i < k + 2; i++) {
      int16_t* line = i == k ? first : second;
      memset(line, 0, static_cast<size_t>(padded) * sizeof(int16_t));
      if (i == task.inner) break;
      const float* x = data + i * b.stride_row;
      const float row = round_line(b, x, b.stride_column, task.columns, 1, task.gathered, line);
      if (row == 1) continue;
      for (int64_t j = 0; j < task.columns; j++)  // which of them it was
        if ((bits_of(x[j * b.stride_column]) & 0x7fffffffu) >= 0x7f800000u) task.factor[j] = row;
    }
    for (int64_t s = 0; s < task.strips; s++) {
      int16_t* out = task.right + s * strip + k * kStripColumns;
      for (int64_t j = 0; j < kStripColumns; j++) {
        out[2 * j] = first[s * kStripColumns + j];
        out[2 * j + 1] = second[s * kStripColumns + j];
      }
    }
  }
}

// R rows of `left` times V vectors of columns from `column`.
template <int R, int V>
FEWBIT_INLINE void multiply_tile(const MatmulTask& task, const float* row_factor, float* y, int64_t column) {
  const int16_t* right = task.right + (column / kStripColumns * task.pairs * kStripColumns + column % kStripColumns) * 2;
  Lanes sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = Lanes{};
  for (int64_t p = 0; p < task.pairs; p++, right += kStripColumns * 2) {
    Lanes b[V];
    for (int v = 0; v < V; v++) memcpy(&b[v], right + v * kLanes * 2, sizeof b[v]);
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, task.left + (r * task.pairs + p) * 2, sizeof pair);
      const Lanes a = Lanes{} + pair;
      for (int v = 0; v < V; v++) sum[r][v] = dot(sum[r][v], a, b[v]);
    }
  }
  const int64_t count = task.columns - column;
  for (int r = 0; r < R; r++) {
    float buffer[V * kLanes], *out = y + r * task.columns + column;
    float* to = count < V * kLanes ? buffer : out;
    for (int v = 0; v < V; v++) {
      const F whole = (F)__builtin_convertvector(sum[r][v], Floats);
      const F scaled = multiply(whole, broadcast(row_factor[r]));
      store(to + v * kLanes, multiply(scaled, load(task.factor + column + v * kLanes)));
    }
    if (to == buffer)
      for (int64_t j = 0; j < count; j++) out[j] = buffer[j];
  }
}

template <int R>
FEWBIT_INLINE void multiply_rows(const MatmulTask& task, int64_t row) {
  const float scale = task.a.scale * task.b.scale;
  float factor[R];
  for (int r = 0; r < R; r++) {
    int16_t* out = task.left + r * task.pairs * 2;
    out[task.pairs * 2 - 1] = 0;
    const float* x = static_cast<const float*>(task.a.data) + (row + r) * task.a.stride_row;
    factor[r] = round_line(task.a, x, task.a.stride_column, task.inner, scale, task.gathered, out);
  }
  float* y = task.y + row * task.columns;
  int64_t column = 0;
  for (; column + kLanes < task.columns; column += kTogether) multiply_tile<R, kVectors>(task, factor, y, column);
  if (column < task.columns) multiply_tile<R, 1>(task, factor, y, column);
}

inline void matmul_run(const MatmulTask& task) {
  int64_t row = 0;
  for (; row + kMatmulRows <= task.rows; row += kMatmulRows) multiply_rows<kMatmulRows>(task, row);
  for (; row < task.rows; row++) multiply_rows<1>(task, row);
}

}  // namespace
}  // namespace fewbit
