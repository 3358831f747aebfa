// SPDX-License-Identifier: Apache-2.0
// The loop of every tile16 kernel, over the vector type of the file that includes it. Included after that file's
// simd.h, inside one translation unit per op and ISA; everything has internal linkage, so no two instruction sets can
// share a function.
//
// A kernel K<BITS> offers:
//   kPanel             floats of the panel that a chunk takes
//   K(table)           what is loaded once per strip, e.g. a table in registers
//   chunk<T, M>(...)   adds a chunk's products to the accumulators of T row groups x M tokens
//   value(codes, k)    the value of column k of a chunk, for blocks that are not whole chunks
//
// A row group is kLanes rows of a tile: one vector. Per column and row group: decode once, then one multiply-add per
// token with a broadcast activation; no horizontal sum, no shuffle.
#pragma once

#include <stdint.h>

#include "core/kernel.h"
#include "core/parts.h"

namespace fewbit {
namespace {

#define FEWBIT_INLINE inline __attribute__((always_inline))

constexpr int kGroupsPerTile = 16 / kLanes;

// Scale or offset of one row group in one block.
FEWBIT_INLINE F parameter(const void* values, bool half, int64_t index) {
  return half ? load_half(static_cast<const uint16_t*>(values) + index)
              : load(static_cast<const float*>(values) + index);
}

// Where a row group's codes and parameters lie.
struct Group {
  const uint8_t* codes;
  int64_t parameters, row;

  FEWBIT_INLINE Group(const Task& task, int64_t index) {
    const int64_t tile = index / kGroupsPerTile, first = index % kGroupsPerTile * kLanes;
    codes = task.codes + tile * task.chunks * task.bits * 64 + first * 4;
    parameters = tile * task.blocks * 16 + first;
    row = tile * 16 + first;
  }
};

// total += scale * (dot - zero * sum) + offset * sum, for block b.
template <int M>
FEWBIT_INLINE void fold(const Task& task, const Group& group, int64_t b, int64_t token, const F (&dot)[M],
                        F (&total)[M]) {
  const F scale = parameter(task.scale, task.scale_half, group.parameters + b * 16);
  const F zero = broadcast(-task.zero);
  for (int m = 0; m < M; m++) {
    F d = dot[m];
    if (task.sums) d = fma(zero, broadcast(task.sums[(token + m) * task.blocks + b]), d);
    total[m] = fma(scale, d, total[m]);
  }
  if (!task.offset) return;
  const F offset = parameter(task.offset, task.offset_half, group.parameters + b * 16);
  for (int m = 0; m < M; m++) total[m] = fma(offset, broadcast(task.sums[(token + m) * task.blocks + b]), total[m]);
}

template <int M>
FEWBIT_INLINE void write(const Task& task, const Group& group, int64_t token, const F (&total)[M]) {
  const int64_t rows = task.rows - group.row;
  for (int m = 0; m < M; m++) {
    float* y = task.y + (token + m) * task.y_stride + group.row;
    if (rows >= kLanes) {
      store(y, task.bias ? add(total[m], load(task.bias + group.row)) : total[m]);
      continue;
    }
    float lanes[kLanes];
    store(lanes, total[m]);
    for (int64_t r = 0; r < rows; r++) y[r] = lanes[r] + (task.bias ? task.bias[group.row + r] : 0.0f);
  }
}

// T row groups x M tokens, blocks of whole chunks (the last one possibly short).
template <class K, int T, int M>
void strip(const Task& task, int64_t index, int64_t token) {
  const K kernel(task.table);
  F total[T][M];
  const uint8_t* codes[T];
  const float* panel[M];
  for (int t = 0; t < T; t++) codes[t] = Group(task, index + t).codes;
  for (int m = 0; m < M; m++) panel[m] = task.panel + (token + m) * task.panel_stride;
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) total[t][m] = broadcast(0.0f);
  const int64_t step = (task.block + 31) / 32;
  for (int64_t b = 0, chunk = 0; b < task.blocks; b++) {
    F acc[T][M][2];
    for (int t = 0; t < T; t++)
      for (int m = 0; m < M; m++) acc[t][m][0] = acc[t][m][1] = broadcast(0.0f);
    const int64_t end = chunk + step < task.chunks ? chunk + step : task.chunks;
    for (; chunk < end; chunk++) {
      kernel.template chunk<T, M>(codes, panel, acc);
      for (int t = 0; t < T; t++) codes[t] += K::kBits * 64;
      for (int m = 0; m < M; m++) panel[m] += K::kPanel;
    }
    for (int t = 0; t < T; t++) {
      F dot[M];
      for (int m = 0; m < M; m++) dot[m] = add(acc[t][m][0], acc[t][m][1]);
      fold<M>(task, Group(task, index + t), b, token, dot, total[t]);
    }
  }
  for (int t = 0; t < T; t++) write<M>(task, Group(task, index + t), token, total[t]);
}

// One row group x M tokens, blocks of any size. The panel holds plain activations, 32 a chunk.
template <class K, int M>
void strip_generic(const Task& task, int64_t index, int64_t token) {
  const K kernel(task.table);
  const Group group(task, index);
  F total[M], acc[M][2];
  for (int m = 0; m < M; m++) total[m] = acc[m][0] = acc[m][1] = broadcast(0.0f);
  int64_t b = 0, end = task.block < task.columns ? task.block : task.columns;
  for (int64_t column = 0; column < task.columns; column++) {
    const F w = kernel.value(group.codes + column / 32 * K::kBits * 64, static_cast<int>(column % 32));
    for (int m = 0; m < M; m++) {
      const F x = broadcast(task.panel[(token + m) * task.panel_stride + column]);
      F& sum = acc[m][column & 1];
      sum = fma(w, x, sum);
    }
    if (column + 1 != end) continue;
    F dot[M];
    for (int m = 0; m < M; m++) {
      dot[m] = add(acc[m][0], acc[m][1]);
      acc[m][0] = acc[m][1] = broadcast(0.0f);
    }
    fold<M>(task, group, b++, token, dot, total);
    end = end + task.block < task.columns ? end + task.block : task.columns;
  }
  write<M>(task, group, token, total);
}

template <class K, int T, int M>
void strips(const Task& task, int64_t begin, int64_t end, int64_t token) {
  if (task.generic) {
    for (int64_t g = begin; g < end; g++) strip_generic<K, M>(task, g, token);
    return;
  }
  for (; begin + T <= end; begin += T) strip<K, T, M>(task, begin, token);
  if (T > 1)
    for (; begin < end; begin++) strip<K, 1, M>(task, begin, token);
}

template <class K>
void run_bits(const Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) strips<K, kGroups4, 4>(task, begin, end, token);
  for (; token + 2 <= tokens; token += 2) strips<K, kGroups2, 2>(task, begin, end, token);
  for (; token < tokens; token++) strips<K, kGroups1, 1>(task, begin, end, token);
}

template <template <int> class K>
void run(const Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.bits) {
    case 1: return run_bits<K<1>>(task, tile_begin, tile_end, tokens);
    case 2: return run_bits<K<2>>(task, tile_begin, tile_end, tokens);
    case 3: return run_bits<K<3>>(task, tile_begin, tile_end, tokens);
    case 4: return run_bits<K<4>>(task, tile_begin, tile_end, tokens);
    case 5: return run_bits<K<5>>(task, tile_begin, tile_end, tokens);
    case 6: return run_bits<K<6>>(task, tile_begin, tile_end, tokens);
    case 7: return run_bits<K<7>>(task, tile_begin, tile_end, tokens);
    case 8: return run_bits<K<8>>(task, tile_begin, tile_end, tokens);
  }
}

// Activations of one chunk with zeros for the columns that do not exist.
FEWBIT_INLINE void chunk_of(const float* x, int64_t columns, float (&out)[32]) {
  for (int64_t k = 0; k < 32; k++) out[k] = k < columns ? x[k] : 0.0f;
}

// Column k of a chunk: its code in the low BITS bits of each lane, anything above them.
template <int BITS>
FEWBIT_INLINE U extract(const uint8_t* codes, int k) {
  U code = shift_right(load_lanes(codes + k * part_width(BITS, 0) / 32 * 64), k * part_width(BITS, 0) % 32);
  for (int p = 1; p < part_count(BITS); p++) {
    const int width = part_width(BITS, p), base = part_base(BITS, p), at = k * width % 32;
    const U lanes = load_lanes(codes + (base + k * width / 32) * 64);
    code = select((1u << base) - 1, code, at > base ? shift_right(lanes, at - base) : shift_left(lanes, base - at));
  }
  return code;
}

}  // namespace
}  // namespace fewbit
