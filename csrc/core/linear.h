// SPDX-License-Identifier: Apache-2.0
// The loop of every tile16 kernel, over the vector type of the file that includes it. Included after that file's
// simd.h, inside one translation unit per op and ISA; everything has internal linkage, so no two instruction sets can
// share a function.
//
// A kernel K<BITS> offers:
//   kBits, kPanel      bits of a code, floats of the panel that a chunk takes
//   kFours             whether eight tokens are computed as twice four: decoding twice costs less than registers that
//                      would hold one activation each
//   K(table)           what is loaded once per strip, e.g. a table in registers
//   chunk<T, M>(...)   adds a chunk's products to the accumulators of T row groups x M tokens
//   value(codes, k)    the value of column k of a chunk, for blocks that are not whole chunks
//
// A row group is kLanes rows of a tile: one vector. Per column and row group: decode once, then one multiply-add per
// token with a broadcast activation; no horizontal sum, no shuffle. A strip that has fewer than T groups or M tokens
// left repeats its last one and writes it once. Each result is one chain of additions in one order, whatever T and M
// are: a token's results do not depend on those beside it.
#pragma once

#include <stdint.h>

#include "core/dtypes.h"
#include "core/inline.h"
#include "core/kernel.h"
#include "core/parts.h"
#include "core/products.h"

namespace fewbit {
namespace {

constexpr int kGroupsPerTile = 16 / kLanes;

// Scale or offset of one row group in one block.
FEWBIT_INLINE F parameter(const void* values, bool half, int64_t index) {
  return half ? load_half(static_cast<const uint16_t*>(values) + index)
              : load(static_cast<const float*>(values) + index);
}

// Where a row group's codes and parameters lie, in any task.
struct Group {
  const uint8_t* codes;
  int64_t parameters, row;

  template <class T>
  FEWBIT_INLINE Group(const T& task, int64_t index) {
    const int64_t tile = index / kGroupsPerTile, first = index % kGroupsPerTile * kLanes;
    codes = task.codes + tile * task.chunks * task.bits * 64 + first * 4;
    parameters = tile * task.blocks * 16 + first;
    row = tile * 16 + first;
  }
};

// One row group of one token, rows from `row`, to y, the bias added.
template <class T>
FEWBIT_INLINE void put(const T& task, int64_t row, int64_t token, F total) {
  const int64_t rows = task.rows - row, at = token * task.y_stride + row;
  if (rows >= kLanes && task.bias) total = add(total, load(task.bias + row));
  if (rows >= kLanes && task.y_dtype == FEWBIT_FLOAT32) return store(static_cast<float*>(task.y) + at, total);
  float lanes[kLanes];
  store(lanes, total);
  for (int64_t r = 0; r < rows && r < kLanes; r++)
    write_float(task.y, task.y_dtype, at + r, rows < kLanes && task.bias ? lanes[r] + task.bias[row + r] : lanes[r]);
}

// What is computed together: row groups from `group`, tile by tile, of which `groups` exist, and tokens (or rows of rounded
// activations) from `token`, of which `tokens` do.
struct Strip {
  int64_t group, groups, token, tokens;
  int64_t apart = kGroupsPerTile;  // from a tile to the next

  template <class T>
  FEWBIT_INLINE Group at(const T& task, int64_t t) const {
    if (t >= groups) t = groups - 1;
    return Group(task, group + t / kGroupsPerTile * apart + t % kGroupsPerTile);
  }

  // Bytes from codes of a tile to those of the next; 0 where there is one, which is then taken for both.
  template <class T>
  FEWBIT_INLINE int64_t codes_apart(const T& task) const {
    return groups > kGroupsPerTile ? apart / kGroupsPerTile * task.chunks * task.bits * 64 : 0;
  }
};

// Whether tiles of a strip of T row groups x M tokens lie apart: few tokens read weights as fast as memory gives them. Two tiles
// of one vector each gain nothing by it.
template <int T, int M>
constexpr bool kTilesApart = M <= 2 && T >= 4 && T > kGroupsPerTile;

// Calls visit(strip) for strips of T row groups that make up a unit from `tile`. Tiles of a strip lie as far apart as they can, and
// those of the next strip behind each of them: so memory is read from places that go on and on, as processors foresee.
template <int T, class Visit>
FEWBIT_INLINE void strips_apart(int64_t rows, int64_t tile, int64_t token, int64_t tokens, const Visit& visit) {
  static_assert(T % kGroupsPerTile == 0, "whole tiles");
  constexpr int64_t places = T / kGroupsPerTile, strips = kTilesPerUnit / places;
  const int64_t apart = units_of(rows) * strips, tiles = ceil_div(rows, 16);
  tile /= places;
  for (int64_t end = least(tile + strips, tiles); tile < end; tile++) {
    const int64_t exist = tile + (places - 1) * apart < tiles ? places : ceil_div(tiles - tile, apart);
    visit(Strip{tile * kGroupsPerTile, exist * kGroupsPerTile, token, tokens, apart * kGroupsPerTile});
  }
}

FEWBIT_INLINE const float* panel_of(const Task& task, const Strip& strip, int64_t floats) {
  const int64_t apart = task.together;
  return task.panel + (strip.token / apart * task.chunks * apart + strip.token % apart) * floats;
}
FEWBIT_INLINE float sum_of(const Task& task, const Strip& strip, int64_t m, int64_t b) {
  return task.sums[(strip.token + m) * task.blocks + b];
}

// Writes what a strip's row groups add up to. A call of its own, once a strip: inlined where it is used, it would be most of
// the code.
template <int T, int M>
FEWBIT_APART void write(const Task& task, const Strip& strip, const F (&total)[T][M]) {
  for (int t = 0; t < T && t < strip.groups; t++)
    for (int m = 0; m < M && m < strip.tokens; m++) put(task, strip.at(task, t).row, strip.token + m, total[t][m]);
}

// total += scale * (dot - zero * sum) + offset * sum, for block b of a row group whose parameters begin at `at`.
template <int M>
FEWBIT_INLINE void fold(const Task& task, const Strip& strip, int64_t at, int64_t b, const F (&dot)[M], F (&total)[M]) {
  const F scale = parameter(task.scale, task.scale_half, at + b * 16);
  const F zero = broadcast(-task.zero);
  for (int m = 0; m < M; m++) {
    F d = dot[m];
    if (task.sums) d = fma(zero, broadcast(sum_of(task, strip, m, b)), d);
    total[m] = fma(scale, d, total[m]);
  }
  if (!task.offset) return;
  const F offset = parameter(task.offset, task.offset_half, at + b * 16);
  for (int m = 0; m < M; m++) total[m] = fma(offset, broadcast(sum_of(task, strip, m, b)), total[m]);
}

// T row groups x M tokens, blocks of whole chunks (the last one possibly short). A call of its own: where several are
// inlined into one function, GCC keeps sums in memory.
template <class K, int T, int M>
FEWBIT_APART void compute(const Task& task, const Strip& strip) {
  const K kernel(task.table);
  F total[T][M];
  const uint8_t* codes[T];
  int64_t parameters[T];
  const float* panel[M];
  for (int t = 0; t < T; t++) {
    const Group group = strip.at(task, t);
    codes[t] = group.codes, parameters[t] = group.parameters;
  }
  for (int m = 0; m < M; m++) panel[m] = panel_of(task, strip, K::kPanel) + m * K::kPanel;
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) total[t][m] = broadcast(0.0f);
  const int64_t step = (task.block + 31) / 32, step_panel = task.together * K::kPanel;
  for (int64_t b = 0, chunk = 0; b < task.blocks; b++) {
    F acc[T][M];
    for (int t = 0; t < T; t++)
      for (int m = 0; m < M; m++) acc[t][m] = broadcast(0.0f);
    const int64_t end = chunk + step < task.chunks ? chunk + step : task.chunks;
    for (; chunk < end; chunk++) {
      kernel.template chunk<T, M>(codes, panel, acc);
      for (int t = 0; t < T; t++) codes[t] += K::kBits * 64;
      for (int m = 0; m < M; m++) panel[m] += step_panel;
    }
    for (int t = 0; t < T; t++) {
      fold<M>(task, strip, parameters[t], b, acc[t], total[t]);
      if constexpr (T * M >= 16)  // which leaves no registers for totals; GCC would rather keep the sums of a block in memory
        for (int m = 0; m < M; m++) asm("" : "+m"(total[t][m]));
    }
  }
  F totals[T][M];  // in memory, where those that are added to are in registers
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) totals[t][m] = total[t][m];
  write(task, strip, totals);
}

// One row group x M tokens, blocks of any size. The panel holds plain activations, 32 a chunk.
template <class K, int M>
FEWBIT_APART void compute_generic(const Task& task, const Strip& strip) {
  const K kernel(task.table);
  const Group group = strip.at(task, 0);
  const float* panel = panel_of(task, strip, 32);
  F total[1][M], acc[M][2];
  for (int m = 0; m < M; m++) total[0][m] = acc[m][0] = acc[m][1] = broadcast(0.0f);
  int64_t b = 0, end = task.block < task.columns ? task.block : task.columns;
  for (int64_t column = 0; column < task.columns; column++) {
    const F w = kernel.value(group.codes + column / 32 * K::kBits * 64, static_cast<int>(column % 32));
    for (int m = 0; m < M; m++) {
      const float x = panel[(column / 32 * task.together + m) * 32 + column % 32];
      acc[m][column & 1] = fma(w, broadcast(x), acc[m][column & 1]);
    }
    if (column + 1 != end) continue;
    F dot[M];
    for (int m = 0; m < M; m++) {
      dot[m] = add(acc[m][0], acc[m][1]);
      acc[m][0] = acc[m][1] = broadcast(0.0f);
    }
    fold<M>(task, strip, group.parameters, b++, dot, total[0]);
    end = end + task.block < task.columns ? end + task.block : task.columns;
  }
  write(task, strip, total);
}

// A unit's groups [begin, end) by T, for the tokens from `token` of which `tokens` exist: M, some times over.
template <class K, int T, int M, int times = 1>
void strips(const Task& task, int64_t begin, int64_t end, int64_t token, int64_t tokens) {
  if constexpr (kTilesApart<T, M>)
    return strips_apart<T>(task.rows, begin / kGroupsPerTile, token, tokens,
                           [&](const Strip& strip) { compute<K, T, M>(task, strip); });
  for (; begin < end; begin += T)
    for (int m = 0; m < times * M; m += M) compute<K, T, M>(task, {begin, end - begin, token + m, tokens - m});
}

// `task.together` tokens lie together and are computed at once; of the last 8, 4 where no more are left.
template <class K>
void run_bits(const Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  for (int64_t token = 0; token < tokens; token += task.together) {
    const int64_t left = tokens - token;
    if (task.generic) {
      for (int64_t g = begin; g < end; g++) {
        const Strip strip = {g, 1, token, left};
        if (task.together > 1) compute_generic<K, 4>(task, strip);
        else compute_generic<K, 1>(task, strip);
      }
    } else if (task.together == 1) {
      strips<K, kGroups1, 1>(task, begin, end, token, left);
    } else if (task.together == 2) {
      strips<K, kGroups2, 2>(task, begin, end, token, left);
    } else {
      if (left <= 4) strips<K, kGroups4, 4>(task, begin, end, token, left);
      else if constexpr (K::kFours) strips<K, kGroups4, 4, 2>(task, begin, end, token, left);
      else strips<K, kGroups8, 8>(task, begin, end, token, left);
    }
  }
}

// Columns [column, end) of one row group, which lie in one chunk and one block: out[column * stride + row].
template <class K>
FEWBIT_INLINE void decode_columns(const Task& task, const K& kernel, const Group& group, int64_t column, int64_t end,
                                  float* out, int64_t stride) {
  const int64_t at = group.parameters + column / task.block * 16;
  const F scale = parameter(task.scale, task.scale_half, at), zero = broadcast(-task.zero);
  const F offset = task.offset ? parameter(task.offset, task.offset_half, at) : zero;
  const uint8_t* codes = group.codes + column / 32 * K::kBits * 64;
  const auto put = [&](int64_t k) {
    F w = multiply(scale, add(kernel.value(codes, static_cast<int>(k)), zero));
    if (task.offset) w = add(w, offset);
    store(out + (column / 32 * 32 + k) * stride, w);
  };
  if (end - column == 32) {
#pragma GCC unroll kUnroll
    for (int k = 0; k < 32; k++) put(k);
  } else {
    for (int64_t k = column % 32; k < column % 32 + end - column; k++) put(k);
  }
}

template <class K>
void decode_tile(const Task& task, int64_t tile, float* out, int64_t stride) {
  const K kernel(task.table);
  for (int64_t g = 0; g < kGroupsPerTile; g++) {
    const Group group(task, tile * kGroupsPerTile + g);
    for (int64_t column = 0; column < task.columns;) {
      int64_t end = column / 32 * 32 + 32;
      const int64_t block_end = (column / task.block + 1) * task.block;
      if (end > block_end) end = block_end;
      if (end > task.columns) end = task.columns;
      decode_columns(task, kernel, group, column, end, out + g * kLanes, stride);
      column = end;
    }
  }
}

template <template <int> class K>
void decode(const Task& task, int64_t tile, float* out, int64_t stride) {
  switch (task.bits) {
    case 1: return decode_tile<K<1>>(task, tile, out, stride);
    case 2: return decode_tile<K<2>>(task, tile, out, stride);
    case 3: return decode_tile<K<3>>(task, tile, out, stride);
    case 4: return decode_tile<K<4>>(task, tile, out, stride);
    case 5: return decode_tile<K<5>>(task, tile, out, stride);
    case 6: return decode_tile<K<6>>(task, tile, out, stride);
    case 7: return decode_tile<K<7>>(task, tile, out, stride);
    case 8: return decode_tile<K<8>>(task, tile, out, stride);
  }
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

// The panel of kernels that want activations as they are.
inline void plain_panels(const float* x, int64_t columns, int64_t chunks, float* out, int64_t stride) {
  for (int64_t c = 0; c < chunks; c++, out += stride) {
    float here[32];
    chunk_of(x + c * 32, columns - c * 32, here);
    for (int k = 0; k < 32; k++) out[k] = here[k];
  }
}

FEWBIT_INLINE U shifted(U lanes, int right) {
  return right > 0 ? shift_right(lanes, right) : right < 0 ? shift_left(lanes, -right) : lanes;
}

// Column k of a chunk: its code at bits [bit, bit + BITS) of each lane, anything beside them.
template <int BITS>
FEWBIT_INLINE U extract(const uint8_t* codes, int k, int bit = 0) {
  constexpr int kFirst = part_width(BITS, 0);
  U code = shifted(load_lanes(codes + part_vector(kFirst, k) * 64), part_shift(kFirst, k) - bit);
  for (int p = 1; p < part_count(BITS); p++) {
    const int width = part_width(BITS, p), base = part_base(BITS, p);
    const U lanes = load_lanes(codes + (base + part_vector(width, k)) * 64);
    code = select(((1u << base) - 1) << bit, code, shifted(lanes, part_shift(width, k) - base - bit));
  }
  return code;
}

// Column k of T row groups, decoded, times that of M tokens.
template <int T, int M>
FEWBIT_INLINE void multiply_add(const F (&w)[T], const float* const (&panel)[M], int k, F (&acc)[T][M]) {
  for (int m = 0; m < M; m++) {
    const F x = broadcast(panel[m][k]);
    for (int t = 0; t < T; t++) acc[t][m] = fma(w[t], x, acc[t][m]);
  }
}

}  // namespace
}  // namespace fewbit
