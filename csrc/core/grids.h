// SPDX-License-Identifier: Apache-2.0
// Even grids: search of their ranges, and columns rounded one after another; what fewbit_grid_search and fewbit_grid_sweep
// say, compiled for the instruction set of the file that includes this. Rows lie side by side in vectors; products
// and sums are rounded one by one, in one order, so that every instruction set gives the same bits.
#pragma once

#include <string.h>

#include "core/grids_kernel.h"

namespace fewbit {
namespace {

constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds what is below 2^22 to an integer, ties to even
#if defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
static_assert(kLanes <= kGridLanes, "scratch is for so many");
constexpr int64_t kRowsTogether = 8 * kLanes;  // sums of as many vectors hide each other's latency
constexpr int64_t kMostColumns = FEWBIT_SWEPT;

struct Grid {
  float scale, zero;
};

inline float code_of(float x, Grid grid, float top) {
  float code = x / grid.scale + grid.zero;
  code = code < 0.0f ? 0.0f : code;
  code = code > top ? top : code;
  return code + kToInteger - kToInteger;
}

// Of rows side by side, a number of each. Aligned as floats are, where it lies in memory.
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t LaneBits __attribute__((vector_size(4 * kLanes), aligned(4)));

struct LaneGrids {
  Lanes scale, zero;
};

// In one instruction, which GCC does not make of a copy.
inline Lanes loaded(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
inline Lanes all(float x) { return Lanes{} + x; }
inline Lanes magnitude(Lanes x) { return reinterpret_cast<Lanes>(reinterpret_cast<LaneBits>(x) & 0x7fffffffu); }
inline Lanes whole(Lanes x) { return x + kToInteger - kToInteger; }

// What a scale is once it was stored in float16: to nearest, ties to even; below 2^-14 that are multiples of 2^-24.
inline Lanes storable(Lanes scale) {
  const Lanes least = all(5.9604644775390625e-08f), most = all(65504.0f), normal = all(6.103515625e-05f);
  scale = scale < least ? least : scale;
  scale = scale > most ? most : scale;
  const LaneBits bits = reinterpret_cast<LaneBits>(scale);
  const LaneBits rounded = (bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu;
  return scale < normal ? scale + 0.5f - 0.5f : reinterpret_cast<Lanes>(rounded);
}

inline Lanes lost_by(Lanes x, float worth, LaneGrids grids, Lanes top) {
  Lanes code = x / grids.scale + grids.zero;
  code = code < all(0) ? all(0) : code;
  code = code > top ? top : code;
  const Lanes off = (whole(code) - grids.zero) * grids.scale - x;
  return off * off * worth;
}

// What each of n x kLanes weights loses, summed over n: the upper half added to the lower one until one is left.
inline Lanes lost_on(const Lanes* x, const float* worth, int64_t n, LaneGrids grids, Lanes top, Lanes* lost) {
  int64_t half = (n + 1) / 2;
  for (int64_t i = 0; i < n - half; i++)
    lost[i] = lost_by(x[i], worth[i], grids, top) + lost_by(x[half + i], worth[half + i], grids, top);
  if (half > n - half) lost[half - 1] = lost_by(x[half - 1], worth[half - 1], grids, top);
  for (n = half; n > 1; n = half) {
    half = (n + 1) / 2;
    for (int64_t i = 0; i < n - half; i++) lost[i] += lost[half + i];
  }
  return lost[0];
}

// Grids between ends that are shrunk by a ratio.
inline LaneGrids between(Lanes low, Lanes high, float ratio, float top) {
  const Lanes from = low * ratio, scale = storable((high * ratio - from) / top), zero = -from / scale;
  return {scale, whole(zero > all(top) ? all(top) : zero)};
}

// Grids around zero, of scales that may be negative.
inline LaneGrids around(Lanes scale, float middle) {
  const Lanes kept = storable(magnitude(scale));
  return {scale < all(0) ? -kept : kept, all(middle)};
}

// Grids of kLanes blocks, x (n) and worth (n).
LaneGrids best_of(const fewbit_grid_search_call& call, const Lanes* x, const float* worth, int64_t n, Lanes* lost) {
  const float top = static_cast<float>(call.levels - 1), levels = static_cast<float>(call.levels);
  const bool ends = call.ends != 0;
  Lanes low = {}, high = {}, largest = x[0];
  for (int64_t i = 0; i < n; i++) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    largest = magnitude(x[i]) > magnitude(largest) ? x[i] : largest;
  }
  const Lanes full = largest * (-2.0f / levels);
  LaneGrids best = ends ? between(low, high, 1.0f, top) : around(2.0f * magnitude(largest) / top, levels / 2);
  Lanes least = lost_on(x, worth, n, best, all(top), lost);
  for (int64_t k = 0; k < call.count; k++) {
    const float ratio = call.ratios[k];
    const LaneGrids tried = ends ? between(low, high, ratio, top) : around(full * ratio, levels / 2);
    const Lanes here = lost_on(x, worth, n, tried, all(top), lost);
    best.scale = here < least ? tried.scale : best.scale;
    best.zero = here < least ? tried.zero : best.zero;
    least = here < least ? here : least;
  }
  return best;
}

// The last block of a row is filled up with zeros that are worth nothing; so are the last rows.
void grid_search_any(const fewbit_grid_search_call& call, float* scratch) {
  const int64_t n = call.block, blocks = (call.columns + n - 1) / n;
  Lanes *x = reinterpret_cast<Lanes*>(scratch), *lost = x + n;
  float* worth = scratch + 2 * kLanes * n;
  for (int64_t row = 0; row < call.rows; row += kLanes)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t rows = call.rows - row < kLanes ? call.rows - row : kLanes;
      const int64_t there = call.columns - b * n < n ? call.columns - b * n : n;
      for (int64_t i = 0; i < n; i++) x[i] = all(0), worth[i] = i < there ? call.worth[b * n + i] : 0;
      for (int64_t l = 0; l < rows; l++)
        for (int64_t i = 0; i < there; i++) x[i][l] = call.weight[(row + l) * call.columns + b * n + i];
      const LaneGrids best = best_of(call, x, worth, n, lost);
      for (int64_t l = 0; l < rows; l++) {
        call.scale[(row + l) * blocks + b] = best.scale[l];
        call.zero[(row + l) * blocks + b] = best.zero[l];
      }
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
      const float passed = call.upper[k * call.upper_stride + j];
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
