// SPDX-License-Identifier: Apache-2.0
// The loops of fewbit_int8_matmul, over the vector type of the file that includes this, after that file's simd.h and its
//
//   pairs(a, b)       a[0] b[0] + a[1] b[1], an int32_t a lane, a lane of a and b being two int16_t
//   kVectors          vectors of columns beside kMatmulRows rows; as many lanes as divide kStripColumns
//
// Codes less their zeros are at most 255 in magnitude, so words hold them and int32 the sums of 2^15 products, exactly.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/dtypes.h"
#include "core/inline.h"
#include "core/matmul.h"
#include "core/nearest.h"

namespace fewbit {
namespace {

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

constexpr int kTogether = kVectors * kLanes;
static_assert(kStripColumns % kTogether == 0, "strips are whole");

// clamp(round_half_even(x / scale + zero), 0, 2^bits - 1) - zero, of `count` numbers; whether all are finite.
inline bool round_all(const fewbit_operand& grid, const float* x, int64_t count, int16_t* out) {
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
  return most < kInfinityBits;
}

FEWBIT_INLINE bool finite(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffffu) < kInfinityBits; }

// Short: a call takes as long as they do.
inline void copy_line(float* out, const float* x, int64_t step, int64_t count) {
  int64_t k = 0;
  if (step == 1)
    for (; k + 4 <= count; k += 4) memcpy(out + k, x + k, 4 * sizeof(float));
  for (; k < count; k++) memcpy(out + k, x + k * step, sizeof(float));
}

// Lines of numbers `step` apart, that begin `apart` from one another, together: as (lines, width), where what is wider
// than a line is zeros, which become zeros. Returns whether all are finite.
FEWBIT_INLINE bool round_lines(const MatmulTask& task, const fewbit_operand& grid, const float* x, int64_t lines,
                               int64_t apart, int64_t step, int64_t count, int64_t width, int16_t* out) {
  if (step == 1 && count == width && (apart == width || lines == 1)) return round_all(grid, x, lines * width, out);
  for (int64_t i = 0; i < lines; i++) {
    copy_line(task.gathered + i * width, x + i * apart, step, count);
    for (int64_t k = count; k < width; k++) task.gathered[i * width + k] = 0;
  }
  return round_all(grid, task.gathered, lines * width, out);
}

// Strips of b, some lines at a time as they lie in memory. Columns that do not exist are zeros; an inner neighbour that does
// not exist may be anything, as it meets a zero of a.
inline void matmul_pack(const MatmulTask& task) {
  const fewbit_operand& b = task.b;
  const int64_t padded = task.strips * kStripColumns, inners = 2 * task.pairs, strip = inners * kStripColumns;
  const auto* data = static_cast<const float*>(b.data);
  const bool down = b.stride_row == 1;  // a column is a line
  const int64_t lines = down ? task.columns : task.inner, width = down ? inners : task.columns;
  const int64_t fit = kGathered / width / 2 * 2, most = fit < 2 ? 2 : fit;
  if (padded > task.columns)
    memset(task.right + (task.strips - 1) * strip, 0, static_cast<size_t>(strip) * sizeof(int16_t));
  bool all = true;
  for (int64_t first = 0; first < lines; first += most) {
    const int64_t here = lines - first < most ? lines - first : most;
    const float* x = data + first * (down ? b.stride_column : b.stride_row);
    if (down) {
      all &= round_lines(task, b, x, here, b.stride_column, 1, task.inner, width, task.lines);
      for (int64_t i = 0; i < here; i++) {
        int16_t* out = task.right + (first + i) / kStripColumns * strip + (first + i) % kStripColumns * 2;
        for (int64_t p = 0; p < task.pairs; p++) memcpy(out + p * kStripColumns * 2, task.lines + i * width + 2 * p, 4);
      }
      continue;
    }
    all &= round_lines(task, b, x, here, b.stride_row, b.stride_column, task.columns, width, task.lines);
    for (int64_t i = 0; i < here; i++)
      for (int64_t s = 0; s < task.strips; s++) {
        const int64_t left = task.columns - s * kStripColumns, count = left < kStripColumns ? left : kStripColumns;
        int16_t* out = task.right + s * strip + (first + i) / 2 * kStripColumns * 2 + i % 2;
        for (int64_t j = 0; j < count; j++) out[2 * j] = task.lines[i * width + s * kStripColumns + j];
      }
  }
  for (int64_t j = 0; j < padded; j++) task.factor[j] = 1;
  for (int64_t k = 0; !all && k < task.inner; k++)
    for (int64_t j = 0; j < task.columns; j++)
      if (!finite(data[k * b.stride_row + j * b.stride_column])) task.factor[j] = float_of(kNaNBits);
}

// R rows of `left` times V vectors of columns from `column`.
template <int R, int V>
FEWBIT_INLINE void multiply_tile(const MatmulTask& task, const float* row_factor, float* y, int64_t column) {
  const int16_t* right = task.right + (column / kStripColumns * task.pairs * kStripColumns + column % kStripColumns) * 2;
  Lanes sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = Lanes{};
  for (int64_t p = 0; p < task.pairs; p++, right += kStripColumns * 2) {
    U b[V];
    for (int v = 0; v < V; v++) memcpy(&b[v], right + v * kLanes * 2, sizeof b[v]);
    for (int r = 0; r < R; r++) {
      uint32_t pair;
      memcpy(&pair, task.left + (r * task.pairs + p) * 2, sizeof pair);
      const U a = repeat(pair);
      for (int v = 0; v < V; v++) sum[r][v] += (Lanes)pairs(a, b[v]);
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
  float factor[R];
  for (int r = 0; r < R; r++) factor[r] = task.a.scale * task.b.scale;
  const float* x = static_cast<const float*>(task.a.data) + row * task.a.stride_row;
  if (!round_lines(task, task.a, x, R, task.a.stride_row, task.a.stride_column, task.inner, 2 * task.pairs, task.left))
    for (int64_t k = 0; k < R * task.inner; k++)
      if (!finite(x[k / task.inner * task.a.stride_row + k % task.inner * task.a.stride_column]))
        factor[k / task.inner] = float_of(kNaNBits);
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
