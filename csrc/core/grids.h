// SPDX-License-Identifier: Apache-2.0
// Even grids: search of their ranges, and columns rounded one after another; what fewbit_grid_search and fewbit_grid_sweep
// of fewbit.h say, compiled for the instruction set of the file that includes this. Plain loops that compilers turn into
// vectors; products and sums are rounded one by one, in one order, so that every instruction set gives the same bits.
#pragma once

#include "core/dtypes.h"
#include "core/kernel.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds what is below 2^22 to an integer, ties to even
constexpr int64_t kRowsTogether = 32;
constexpr int64_t kMostColumns = FEWBIT_SWEPT;

struct Grid {
  float scale, zero;
};

inline float storable(float scale) {
  const float least = 5.9604644775390625e-08f, most = 65504.0f;
  return from_float16(to_float16(scale < least ? least : scale > most ? most : scale));
}

inline float code_of(float x, Grid grid, float top) {
  float code = x / grid.scale + grid.zero;
  code = code < 0.0f ? 0.0f : code;
  code = code > top ? top : code;
  return code + kToInteger - kToInteger;
}

// Sum of n floats, the upper half added to the lower one until one is left.
template <class Count>
inline float halved(float* x, Count n) {
  while (n > 1) {
    const Count half = (n + 1) / 2;
    for (Count i = 0; i < n - half; i++) x[i] += x[half + i];
    n = half;
  }
  return x[0];
}

inline float lost_by(float x, float worth, Grid grid, float top) {
  const float off = (code_of(x, grid, top) - grid.zero) * grid.scale - x;
  return off * off * worth;
}

// What n weights lose on a grid. N: n where that is known to the compiler, and a multiple of 4, else 0.
template <int N>
float lost_on(const float* x, const float* worth, int64_t n, Grid grid, float top, float* lost) {
  if (!N) {
    for (int64_t i = 0; i < n; i++) lost[i] = lost_by(x[i], worth[i], grid, top);
    return halved(lost, n);
  }
  constexpr int kQuarter = N ? N / 4 : 1;
  float quarter[kQuarter];  // halved twice already
  for (int i = 0; i < kQuarter; i++) {
    const int at[4] = {i, i + 2 * kQuarter, i + kQuarter, i + 3 * kQuarter};
    float here[4];
    for (int k = 0; k < 4; k++) here[k] = lost_by(x[at[k]], worth[at[k]], grid, top);
    quarter[i] = (here[0] + here[1]) + (here[2] + here[3]);
  }
  return halved(quarter, kQuarter);
}

// Grids of one block, x and worth (n).
template <int N>
Grid best_of(const fewbit_grid_search_call& call, const float* x, const float* worth, int64_t n, float* lost) {
  const float top = static_cast<float>(call.levels - 1);
  float low = 0, high = 0, largest = x[0];
  for (int64_t i = 0; i < n; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
  const bool ends = call.ends != 0;
  if (!ends)
    for (int64_t i = 0; i < n; i++)
      if ((x[i] < 0 ? -x[i] : x[i]) > (largest < 0 ? -largest : largest)) largest = x[i];
  const auto between = [&](float ratio) {
    const float from = low * ratio, scale = storable((high * ratio - from) / top);
    const float zero = -from / scale, kept = zero > top ? top : zero;
    return Grid{scale, kept + kToInteger - kToInteger};
  };
  const float middle = static_cast<float>(call.levels) / 2, full = largest * (-2.0f / static_cast<float>(call.levels));
  const auto around = [&](float ratio) {
    const float scale = full * ratio;
    return Grid{scale < 0 ? -storable(-scale) : storable(scale), middle};
  };
  Grid best = ends ? between(1.0f) : Grid{storable(2.0f * (largest < 0 ? -largest : largest) / top), middle};
  float least = lost_on<N>(x, worth, n, best, top, lost);
  for (int64_t k = 0; k < call.count; k++) {
    const Grid grid = ends ? between(call.ratios[k]) : around(call.ratios[k]);
    const float here = lost_on<N>(x, worth, n, grid, top, lost);
    if (here < least) least = here, best = grid;
  }
  return best;
}

// The last block of a row is filled up with zeros that are worth nothing.
template <int N>
void search_rows(const fewbit_grid_search_call& call, float* scratch) {
  const int64_t n = call.block, blocks = (call.columns + n - 1) / n, rest = call.columns - (blocks - 1) * n;
  float *lost = scratch, *x = scratch + n, *worth = scratch + 2 * n;
  for (int64_t i = rest; i < n; i++) x[i] = worth[i] = 0;
  for (int64_t row = 0; row < call.rows; row++)
    for (int64_t b = 0; b < blocks; b++) {
      const float *values = call.weight + row * call.columns + b * n, *weights = call.worth + b * n;
      if (b == blocks - 1 && rest < n) {
        for (int64_t i = 0; i < rest; i++) x[i] = values[i], worth[i] = weights[i];
        values = x, weights = worth;
      }
      const Grid best = best_of<N>(call, values, weights, n, lost);
      call.scale[row * blocks + b] = best.scale, call.zero[row * blocks + b] = best.zero;
    }
}

// `scratch`: 3 blocks.
void grid_search_any(const fewbit_grid_search_call& call, float* scratch) {
  switch (call.block) {
    case 32: return search_rows<32>(call, scratch);
    case 64: return search_rows<64>(call, scratch);
    case 128: return search_rows<128>(call, scratch);
    default: return search_rows<0>(call, scratch);
  }
}

// Rows [first, first + kRowsTogether) of all columns of the call, or `count` of them: the others are zeros.
void sweep_rows(const fewbit_grid_sweep_call& call, int64_t first, int64_t count) {
  const float top = static_cast<float>(call.levels - 1);
  float lost[kMostColumns][kRowsTogether];
  for (int64_t k = 0; k < call.columns; k++) {
    const int64_t place = call.order[k], block = place / call.block, at = k * call.rows + first;
    float now[kRowsTogether] = {}, before[kRowsTogether] = {}, scale[kRowsTogether], zero[kRowsTogether] = {};
    for (int64_t i = 0; i < kRowsTogether; i++) scale[i] = 1;
    for (int64_t i = 0; i < count; i++) {
      now[i] = call.current[at + i], before[i] = call.before[at + i];
      scale[i] = call.scale[block * call.rows + first + i], zero[i] = call.zero[block * call.rows + first + i];
    }
    for (int64_t j = 0; j < k; j++) {
      const float passed = call.upper[j * call.upper_stride + k];
      for (int64_t i = 0; i < kRowsTogether; i++) now[i] += passed * lost[j][i];
    }
    uint8_t codes[kRowsTogether];
    for (int64_t i = 0; i < kRowsTogether; i++) {
      const float code = code_of(now[i], {scale[i], zero[i]}, top);
      lost[k][i] = before[i] - (code - zero[i]) * scale[i];
      codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code));
    }
    memcpy(call.codes + place * call.rows + first, codes, static_cast<size_t>(count));
    memcpy(call.lost + at, lost[k], static_cast<size_t>(count) * sizeof(float));
  }
}

void grid_sweep_any(const fewbit_grid_sweep_call& call) {
  for (int64_t first = 0; first < call.rows; first += kRowsTogether)
    sweep_rows(call, first, call.rows - first < kRowsTogether ? call.rows - first : kRowsTogether);
}

}  // namespace
}  // namespace fewbit
