// SPDX-License-Identifier: Apache-2.0
// Weights rounded to the first of the grids that core/grids.h tries, and what codes lose: what fewbit_grid_round and
// fewbit_squares say, compiled for the instruction set of the file that includes this. Columns lie side by side in vectors.
#pragma once

#include "core/grids.h"

namespace fewbit {
namespace {

// The least and the largest of n weights and 0, those of each lane apart.
struct Ends {
  Lanes low, high;
};

struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Most {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
constexpr Least least;
constexpr Most most;

inline Ends ends_of(const float* x, int64_t n) {
  Ends ends = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) ends = {least(loaded(x + i), ends.low), most(loaded(x + i), ends.high)};
  Lanes rest = {};
  for (int64_t l = 0; i < n; i++, l++) rest[l] = x[i];
  return {least(rest, ends.low), most(rest, ends.high)};
}

// Of each of kLanes vectors what `choose` finds in it.
template <class Choose>
inline Lanes across(const Lanes* x, Choose choose) {
  Lanes found;
  for (int b = 0; b < kLanes; b++) {
    float one = x[b][0];
    for (int l = 1; l < kLanes; l++) one = choose(one, x[b][l]);
    found[b] = one;
  }
  return found;
}

inline Lanes code_of(Lanes x, LaneGrids grids, Lanes top) {
  Lanes code = x / grids.scale + grids.zero;
  code = code < all(0) ? all(0) : code;
  return whole(code > top ? top : code);
}

typedef int32_t LaneIntegers __attribute__((vector_size(4 * kLanes)));

// kVectors x kLanes codes, which the compiler packs to bytes as a whole.
template <int64_t kVectors>
inline void codes_of(LaneGrids grids, Lanes top, const float* x, uint8_t* codes) {
  int32_t integers[kVectors * kLanes];
  for (int64_t v = 0; v < kVectors; v++) {
    const LaneIntegers code = __builtin_convertvector(code_of(loaded(x + v * kLanes), grids, top), LaneIntegers);
    memcpy(integers + v * kLanes, &code, sizeof code);
  }
  for (int64_t i = 0; i < kVectors * kLanes; i++) codes[i] = static_cast<uint8_t>(integers[i]);
}

inline void codes_on(Grid grid, float top, const float* x, int64_t n, uint8_t* codes) {
  const LaneGrids grids = {all(grid.scale), all(grid.zero)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) codes_of<4>(grids, all(top), x + i, codes + i);
  for (; i + kLanes <= n; i += kLanes) codes_of<1>(grids, all(top), x + i, codes + i);
  for (; i < n; i++) codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code_of(x[i], grid, top)));
}

// Grids of the blocks [first, first + together) of a row, which share what it takes to find them.
void fit_grids(const fewbit_grid_round_call& call, const float* x, int64_t first, int64_t together, float* scale, float* zero) {
  const float top = static_cast<float>(call.levels - 1), middle = static_cast<float>(call.levels) / 2;
  Lanes low[kLanes], high[kLanes];
  for (int64_t b = 0; b < kLanes; b++) {
    const int64_t begin = (first + b) * call.block, left = call.columns - begin;
    const Ends ends = b < together ? ends_of(x + begin, left < call.block ? left : call.block) : Ends{};
    low[b] = ends.low, high[b] = ends.high;
  }
  const Lanes from = across(low, least), to = across(high, most);
  const LaneGrids grids = call.ends ? between(from, to, 1.0f, top) : around(2.0f * most(-from, to) / top, middle);
  for (int64_t b = 0; b < together; b++) scale[first + b] = grids.scale[b], zero[first + b] = grids.zero[b];
}

void grid_round_any(const fewbit_grid_round_call& call) {
  const int64_t n = call.block, blocks = (call.columns + n - 1) / n;
  const float top = static_cast<float>(call.levels - 1);
  for (int64_t row = 0; row < call.rows; row++) {
    const float* x = call.weight + row * call.columns;
    float *scale = call.scale + row * blocks, *zero = call.zero + row * blocks;
    uint8_t* codes = call.codes + row * call.columns;
    for (int64_t b = 0; b < blocks && !call.given; b += kLanes)
      fit_grids(call, x, b, blocks - b < kLanes ? blocks - b : kLanes, scale, zero);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t left = call.columns - b * n;
      codes_on({scale[b], zero[b]}, top, x + b * n, left < n ? left : n, codes + b * n);
    }
  }
}

constexpr int64_t kSquares = 4 * kLanes;  // columns added up at a time

// Of one row, each column of so many by itself.
struct Squares {
  float lost[kSquares], whole[kSquares];
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
  double lost = 0, whole = 0;
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
    for (int64_t l = 0; l < kSquares; l++) lost += sum.lost[l], whole += sum.whole[l];
  }
  call.sums[0] = lost, call.sums[1] = whole;
}

void squares_any(const fewbit_squares_call& call) { call.table ? squares_of<true>(call) : squares_of<false>(call); }

}  // namespace
}  // namespace fewbit
