// SPDX-License-Identifier: Apache-2.0
// Weights rounded to the first of the grids that core/grids.h tries, and what codes lose: what fewbit_grid_round and
// fewbit_squares say, compiled for the instruction set of the file that includes this. Columns lie side by side in vectors.
#pragma once

#include "core/dtypes.h"
#include "core/grids.h"
#if defined(__AVX2__)
#include <immintrin.h>

namespace fewbit {
namespace {

using F = Lanes;  // as core/quotient.h asks for
inline F multiply(F a, F b) { return a * b; }
inline F fused(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

}  // namespace
}  // namespace fewbit

#include "core/quotient.h"
#endif

namespace fewbit {
namespace {

// The least and the largest of n weights and 0, those of each lane apart.
struct Ends {
  Lanes low, high;
};

// a < b ? a : b and a > b ? a : b, of lanes in one instruction, which GCC does not always find.
struct Least {
  float operator()(float a, float b) const { return a < b ? a : b; }
  Lanes operator()(Lanes a, Lanes b) const {
#if defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
  }
};

struct Most {
  float operator()(float a, float b) const { return a > b ? a : b; }
  Lanes operator()(Lanes a, Lanes b) const {
#if defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
  }
};
constexpr Least least;
constexpr Most most;

inline Ends ends_of(const float* x, int64_t n) {
  Ends ends = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) ends = {least(loaded(x + i), ends.low), most(loaded(x + i), ends.high)};
  if (i == n) return ends;
  Lanes rest = {};
  for (int64_t l = 0; i < n; i++, l++) rest[l] = x[i];
  return {least(rest, ends.low), most(rest, ends.high)};
}

// Of each of kLanes vectors what `choose` finds in it: neighbours are chosen from, in halves of 16 bytes, then the halves.
template <class Choose>
inline Lanes across(Lanes* x, Choose choose) {
#if defined(__AVX2__)
  for (int left = 4; left > 1; left /= 2)
    for (int b = 0; b < left; b++)
      x[b] = choose(__builtin_shufflevector(x[2 * b], x[2 * b + 1], 0, 2, 8, 10, 4, 6, 12, 14),
                    __builtin_shufflevector(x[2 * b], x[2 * b + 1], 1, 3, 9, 11, 5, 7, 13, 15));
  return choose(__builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 8, 9, 10, 11),
                __builtin_shufflevector(x[0], x[1], 4, 5, 6, 7, 12, 13, 14, 15));
#else
  for (int left = 2; left > 0; left /= 2)
    for (int b = 0; b < left; b++)
      x[b] = choose(__builtin_shufflevector(x[2 * b], x[2 * b + 1], 0, 2, 4, 6),
                    __builtin_shufflevector(x[2 * b], x[2 * b + 1], 1, 3, 5, 7));
  return x[0];
#endif
}

constexpr int64_t kSquares = 4 * kLanes;  // columns added up at a time

// Of one row, each column of so many by itself.
struct Squares {
  float lost[kSquares], whole[kSquares];

  void add_to(double* sums) const {
    for (int64_t l = 0; l < kSquares; l++) sums[0] += lost[l], sums[1] += whole[l];
  }
};

// n columns under one scale, at most kSquares. `table`: null where codes are the levels.
template <bool kTable>
inline void add_squares(const float* x, const uint8_t* codes, const float* table, Grid grid, int64_t n, Squares* sum) {
  for (int64_t i = 0; i < n; i++) {
    const float level = kTable ? table[codes[i]] : static_cast<float>(codes[i]);
    const float off = level * grid.scale + grid.zero - x[i];
    sum->lost[i] += off * off;
    sum->whole[i] += x[i] * x[i];
  }
}

template <bool kTable>
void squares_of(const fewbit_squares_call& call) {
  const int64_t blocks = (call.columns + call.block - 1) / call.block;
  call.sums[0] = call.sums[1] = 0;
  for (int64_t row = 0; row < call.rows; row++) {
    const float* x = call.weight + row * call.columns;
    const uint8_t* codes = call.codes + row * call.columns;
    Squares sum = {};
    for (int64_t b = 0; b < blocks; b++) {
      const Grid grid = {call.scale[row * blocks + b], call.offset ? call.offset[row * blocks + b] : 0.0f};
      int64_t i = b * call.block;
      const int64_t end = i + call.block < call.columns ? i + call.block : call.columns;
      for (; i + kSquares <= end; i += kSquares) add_squares<kTable>(x + i, codes + i, call.table, grid, kSquares, &sum);
      add_squares<kTable>(x + i, codes + i, call.table, grid, end - i, &sum);
    }
    sum.add_to(call.sums);
  }
}

void squares_any(const fewbit_squares_call& call) { call.table ? squares_of<true>(call) : squares_of<false>(call); }

typedef int32_t LaneIntegers __attribute__((vector_size(4 * kLanes)));

// Grids of kLanes blocks, and what dividing by their scales and their values take.
struct Blocks {
  LaneGrids grids;
  Lanes by, inverse, offset;

  explicit Blocks(LaneGrids g)
      : grids(g), by(g.scale == all(0) ? all(1) : g.scale), inverse(1.0f / by), offset(-g.scale * g.zero) {}
};

// kSquares codes on the grid of block b, and what they lose.
struct Rounder {
  Lanes by, inverse, limit, scale, zero, offset, top;

  Rounder(const Blocks& blocks, int64_t b, float top)
      : by(all(blocks.by[b])), inverse(all(blocks.inverse[b])), limit(magnitude(by * 1024.0f)), scale(all(blocks.grids.scale[b])),
        zero(all(blocks.grids.zero[b])), offset(all(blocks.offset[b])), top(all(top)) {}

  // x / by, or what is as far beyond all codes.
  Lanes over(Lanes x) const {
#if defined(__AVX2__)
    return quotient(most(-limit, least(limit, x)), by, inverse);
#else
    return x / by;
#endif
  }

  void operator()(const float* x, uint8_t* codes, Lanes* lost, Lanes* total) const {
    int32_t integers[kSquares];
    for (int64_t v = 0; v < kSquares / kLanes; v++) {
      const Lanes value = loaded(x + v * kLanes);
      const Lanes code = whole(least(most(over(value) + zero, all(0)), top));  // 0 of NaN
      const Lanes off = code * scale + offset - value;
      lost[v] += off * off, total[v] += value * value;
      const LaneIntegers integer = __builtin_convertvector(code, LaneIntegers);
      memcpy(integers + v * kLanes, &integer, sizeof integer);
    }
    for (int64_t i = 0; i < kSquares; i++) codes[i] = static_cast<uint8_t>(integers[i]);
  }
};

// Of n columns of one block. Where they are too few, zeros follow, which lose nothing.
inline void codes_on(const Rounder& round, const float* x, int64_t n, uint8_t* codes, Lanes* lost, Lanes* total) {
  int64_t i = 0;
  for (; i + kSquares <= n; i += kSquares) round(x + i, codes + i, lost, total);
  if (i == n) return;
  float rest[kSquares] = {};
  uint8_t found[kSquares];
  memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof *x);
  round(rest, found, lost, total);
  memcpy(codes + i, found, static_cast<size_t>(n - i));
}

// Grids of the blocks [first, first + together) of a row, which share what it takes to find them.
LaneGrids fitted(const fewbit_grid_round_call& call, const float* x, int64_t first, int64_t together) {
  const float top = static_cast<float>(call.levels - 1), middle = static_cast<float>(call.levels) / 2;
  Lanes low[kLanes], high[kLanes];
  for (int64_t b = 0; b < kLanes; b++) {
    const int64_t begin = (first + b) * call.block, left = call.columns - begin;
    const Ends ends = b < together ? ends_of(x + begin, left < call.block ? left : call.block) : Ends{};
    low[b] = ends.low, high[b] = ends.high;
  }
  const Lanes from = across(low, least), to = across(high, most);
  return call.zero ? between(from, to, 1.0f, top) : around(2.0f * most(-from, to) / top, middle);
}

// Grids of `together` blocks as they are stored, from `at` on.
LaneGrids stored(const fewbit_grid_round_call& call, int64_t at, int64_t together) {
  LaneGrids grids = {all(1), all(static_cast<float>(call.levels) / 2)};
  for (int64_t b = 0; b < together; b++) {
    grids.scale[b] = from_float16(call.scale[at + b]);
    if (call.zero) grids.zero[b] = call.zero[at + b];
  }
  return grids;
}

void store(const fewbit_grid_round_call& call, const LaneGrids& grids, int64_t at, int64_t together) {
  for (int64_t b = 0; b < together; b++) {
    call.scale[at + b] = to_float16(grids.scale[b]);
    if (call.zero) call.zero[at + b] = static_cast<uint8_t>(grids.zero[b]);
  }
}

void grid_round_any(const fewbit_grid_round_call& call) {
  const int64_t n = call.block, blocks = (call.columns + n - 1) / n;
  const float top = static_cast<float>(call.levels - 1);
  call.sums[0] = call.sums[1] = 0;
  for (int64_t row = 0; row < call.rows; row++) {
    const float* x = call.weight + row * call.columns;
    uint8_t* codes = call.codes + row * call.columns;
    Lanes lost[kSquares / kLanes] = {}, total[kSquares / kLanes] = {};
    for (int64_t first = 0; first < blocks; first += kLanes) {
      const int64_t at = row * blocks + first, together = blocks - first < kLanes ? blocks - first : kLanes;
      const Blocks made(call.given ? stored(call, at, together) : fitted(call, x, first, together));
      if (!call.given) store(call, made.grids, at, together);
      for (int64_t b = 0; b < together; b++) {
        const int64_t begin = (first + b) * n, left = call.columns - begin;
        codes_on({made, b, top}, x + begin, left < n ? left : n, codes + begin, lost, total);
      }
    }
    Squares sum;
    memcpy(sum.lost, lost, sizeof lost), memcpy(sum.whole, total, sizeof total);
    sum.add_to(call.sums);
  }
}

}  // namespace
}  // namespace fewbit
