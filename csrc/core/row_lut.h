// SPDX-License-Identifier: Apache-2.0
// y = x W^T where rows have tables of their own: a vector holds neighbouring columns of one row, whose levels lie in
// registers, or in memory where they are more than registers hold. Included after an ISA's simd.h.
//
// The layout is row16: see fewbit_row_tables.
#pragma once

#include <string.h>

#include <array>
#include <utility>

#include "core/dtypes.h"
#include "core/inline.h"
#include "core/kernel.h"

namespace fewbit {
namespace {

// R rows x M tokens, two chains of sums each, so that what is computed does not depend on either.
constexpr int kRowChains = 2;

// Rows that are computed beside M tokens, whose sums need not wait for one another; as many as registers hold, with their tables.
template <int BITS, int M>
constexpr int kRowsBeside = kLanes < 16 || BITS > 6 ? 1 : BITS > 4 && M > 1 ? 2 : 4;

template <int BITS>
struct RowCells {
  static constexpr int kUnit = BITS % 3 ? 1 : 3;           // bytes that a lane takes in a chunk
  static constexpr int kFields = 8 * kUnit / BITS;         // codes in them
  static constexpr int kBytes = 16 * kUnit, kColumns = 16 * kFields;

  const uint8_t* bytes;
  int64_t apart;  // bytes from a part to the next

  // Chunk `chunk` of a row of `chunks`.
  FEWBIT_INLINE RowCells(const uint8_t* row, int64_t chunk, int64_t chunks) {
    const int64_t beside = chunk % kRowChunks, first = chunk - beside, left = chunks - first;
    bytes = row + first * kBytes + beside * 16;
    apart = (left < kRowChunks ? left : kRowChunks) * 16;
  }

  // The codes of kLanes lanes from `lane`.
  FEWBIT_INLINE U lanes(int lane) const {
    U found = load_bytes(bytes + lane);
    for (int i = 1; i < kUnit; i++) found = combine(found, shift_left(load_bytes(bytes + i * apart + lane), 8 * i));
    return found;
  }
};

// The levels of one row as floats.
template <int BITS>
struct RowLevels {
  float level[1 << BITS];

  RowLevels() = default;
  FEWBIT_INLINE RowLevels(const RowTask& task, int64_t row) {
    const int64_t at = row / task.table_rows << BITS;
    if (!task.table_half) {
      memcpy(level, static_cast<const float*>(task.table) + at, sizeof level);
      return;
    }
    const auto* half = static_cast<const uint16_t*>(task.table) + at;
    if constexpr ((1 << BITS) % kLanes == 0) {
      for (int i = 0; i < 1 << BITS; i += kLanes) store(level + i, load_half(half + i));
    } else {
      for (int i = 0; i < 1 << BITS; i++) level[i] = from_float16(half[i]);
    }
  }
};

template <int BITS, int R, size_t... r>
FEWBIT_INLINE std::array<Lookup<BITS>, R> lookups(const RowLevels<BITS> (&levels)[R], std::index_sequence<r...>) {
  return {Lookup<BITS>(levels[r].level)...};
}

FEWBIT_INLINE float total_of(F sum) {
  float lanes[kLanes], total = 0;
  store(lanes, sum);
  for (const float lane : lanes) total += lane;
  return total;
}

// Rows [row, row + R) of M tokens from `token`, of which `tokens` exist. A call of its own: see `compute` in linear.h.
template <int BITS, int R, int M>
FEWBIT_APART void rows_beside(const RowTask& task, int64_t row, int64_t token, int64_t tokens) {
  using Cells = RowCells<BITS>;
  const int64_t bytes = task.chunks * Cells::kBytes, apart = task.chunks * Cells::kColumns;
  const uint8_t* codes = task.codes + row * bytes;
  const float* x = task.panel + token * apart;
  RowLevels<BITS> levels[R];
  for (int r = 0; r < R; r++) levels[r] = {task, row + r};
  const auto tables = lookups<BITS>(levels, std::make_index_sequence<R>());
  F total[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = broadcast(0.0f);
  int64_t chunk = 0;
  for (int64_t b = 0; b < task.blocks; b++) {
    F sum[R][M][kRowChains];
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        for (int c = 0; c < kRowChains; c++) sum[r][m][c] = broadcast(0.0f);
    const int64_t end = b + 1 < task.blocks ? (b + 1) * task.block_chunks : task.chunks;
    for (; chunk < end; chunk++, x += Cells::kColumns) {
      for (int line = 0; R > 1 && line < R * Cells::kBytes; line += 64)
        __builtin_prefetch(codes + kRowsAhead * bytes + chunk * R * Cells::kBytes + line, 0, 2);
      for (int lane = 0; lane < 16; lane += kLanes) {
        U lanes[R];
        for (int r = 0; r < R; r++) lanes[r] = Cells(codes + r * bytes, chunk, task.chunks).lanes(lane);
#pragma GCC unroll 8
        for (int n = 0; n < Cells::kFields; n++) {
          F w[R];
          for (int r = 0; r < R; r++) w[r] = tables[r](n ? shift_right(lanes[r], n * BITS) : lanes[r]);
          for (int m = 0; m < M; m++) {
            const F here = load(x + m * apart + n * 16 + lane);
            for (int r = 0; r < R; r++) {
              F& chain = sum[r][m][(n + lane / kLanes) % kRowChains];
              chain = fma(w[r], here, chain);
            }
          }
        }
      }
    }
    for (int r = 0; r < R; r++) {
      const F scale = broadcast(task.scale[(row + r) * task.blocks + b]);
      for (int m = 0; m < M; m++) total[r][m] = fma(scale, add(sum[r][m][0], sum[r][m][1]), total[r][m]);
    }
  }
  for (int m = 0; m < M && m < tokens; m++)
    for (int r = 0; r < R; r++) {
      const float y = total_of(total[r][m]) + (task.bias ? task.bias[row + r] : 0.0f);
      write_float(task.y, task.y_dtype, (token + m) * task.y_stride + row + r, y);
    }
}

// Rows [begin, end) for M tokens from `token`.
template <int BITS, int M>
FEWBIT_INLINE void rows_by(const RowTask& task, int64_t begin, int64_t end, int64_t token, int64_t tokens) {
  constexpr int R = kRowsBeside<BITS, M>;
  for (; begin + R <= end; begin += R) rows_beside<BITS, R, M>(task, begin, token, tokens);
  for (; begin < end; begin++) rows_beside<BITS, 1, M>(task, begin, token, tokens);
}

template <int BITS>
void rows_of(const RowTask& task, int64_t begin, int64_t end) {
  for (int64_t token = 0; token < task.tokens; token += task.together) {
    if (task.together == 1) rows_by<BITS, 1>(task, begin, end, token, 1);
    else rows_by<BITS, kRowTokens>(task, begin, end, token, task.tokens - token);
  }
}

// out[column]: the weights of one row.
template <int BITS>
void decode_row(const RowTask& task, int64_t row, float* out) {
  using Cells = RowCells<BITS>;
  const RowLevels<BITS> levels(task, row);
  const Lookup<BITS> lookup(levels.level);
  const uint8_t* codes = task.codes + row * task.chunks * Cells::kBytes;
  for (int64_t chunk = 0; chunk < task.chunks; chunk++) {
    const Cells cells(codes, chunk, task.chunks);
    const int64_t first = chunk * Cells::kColumns, left = task.columns - first;
    const int64_t b = chunk / task.block_chunks;
    const F scale = broadcast(task.scale[row * task.blocks + (b < task.blocks ? b : task.blocks - 1)]);
    float w[Cells::kColumns];
    for (int lane = 0; lane < 16; lane += kLanes) {
      const U lanes = cells.lanes(lane);
      for (int n = 0; n < Cells::kFields; n++)
        store(w + n * 16 + lane, multiply(scale, lookup(shift_right(lanes, n * BITS))));
    }
    memcpy(out + first, w, static_cast<size_t>(left < Cells::kColumns ? left : Cells::kColumns) * sizeof(float));
  }
}

inline void row_lut_run(const RowTask& task, int64_t begin, int64_t end) {
  switch (task.bits) {
    case 1: return rows_of<1>(task, begin, end);
    case 2: return rows_of<2>(task, begin, end);
    case 3: return rows_of<3>(task, begin, end);
    case 4: return rows_of<4>(task, begin, end);
    case 6: return rows_of<6>(task, begin, end);
    case 8: return rows_of<8>(task, begin, end);
  }
}

inline void row_lut_decode(const RowTask& task, int64_t row, float* out) {
  switch (task.bits) {
    case 1: return decode_row<1>(task, row, out);
    case 2: return decode_row<2>(task, row, out);
    case 3: return decode_row<3>(task, row, out);
    case 4: return decode_row<4>(task, row, out);
    case 6: return decode_row<6>(task, row, out);
    case 8: return decode_row<8>(task, row, out);
  }
}

}  // namespace
}  // namespace fewbit
