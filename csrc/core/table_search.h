// SPDX-License-Identifier: Apache-2.0
// The scale under which each block of weights is nearest to a table: what fewbit_table_search says, compiled for the
// instruction set of the file that includes this. Blocks lie side by side in vectors; see core/grids.h for the rest.
#pragma once

#include "core/grids.h"

namespace fewbit {
namespace {

constexpr int64_t kTogether = 8;  // vectors that share what is loaded of a table, and hide each other's latency

// What each of kVectors x kLanes weights loses.
template <int64_t kVectors>
inline void lose(const fewbit_table_search_call& call, const Lanes* x, const Lanes* worth, Lanes scale, Lanes* lost) {
  Lanes at[kVectors], level[kVectors];
  for (int64_t i = 0; i < kVectors; i++) at[i] = x[i] / scale, level[i] = all(call.table[0]);
  for (int64_t k = 1; k < call.levels; k++) {
    const Lanes bound = all(call.bounds[k - 1]), next = all(call.table[k]);
    for (int64_t i = 0; i < kVectors; i++) level[i] = at[i] > bound ? next : level[i];
  }
  for (int64_t i = 0; i < kVectors; i++) {
    const Lanes off = scale * level[i] - x[i];
    lost[i] = off * off * worth[i];
  }
}

// What each of kLanes blocks of n weights loses: the upper half added to the lower one until one is left.
inline Lanes lost_at(const fewbit_table_search_call& call, const Lanes* x, const Lanes* worth, Lanes scale, Lanes* lost) {
  int64_t i = 0, n = call.block, half;
  for (; i + kTogether <= n; i += kTogether) lose<kTogether>(call, x + i, worth + i, scale, lost + i);
  for (; i < n; i++) lose<1>(call, x + i, worth + i, scale, lost + i);
  for (; n > 1; n = half) {
    half = (n + 1) / 2;
    for (i = 0; i < n - half; i++) lost[i] += lost[half + i];
  }
  return lost[0];
}

// Lanes to spare hold the last block again.
void table_search_any(const fewbit_table_search_call& call, float* scratch) {
  const int64_t n = call.block, all_blocks = call.rows * call.blocks;
  Lanes *x = reinterpret_cast<Lanes*>(scratch), *worth = x + n, *lost = worth + n;
  for (int64_t first = 0; first < all_blocks; first += kLanes) {
    int64_t block[kLanes], best[kLanes] = {};
    for (int l = 0; l < kLanes; l++) {
      block[l] = first + l < all_blocks ? first + l : all_blocks - 1;
      for (int64_t i = 0; i < n; i++) {
        x[i][l] = call.weight[block[l] * n + i];
        worth[i][l] = call.worth[block[l] % call.blocks * n + i];
      }
    }
    Lanes least = {}, before = {};
    for (int64_t k = 0; k < call.count; k++) {
      Lanes scale;
      for (int l = 0; l < kLanes; l++) scale[l] = call.scales[k * all_blocks + block[l]];
      if (k && !memcmp(&scale, &before, sizeof scale)) continue;  // the same once more, which is no better
      const Lanes here = lost_at(call, x, worth, scale, lost);
      for (int l = 0; l < kLanes; l++)
        if (!k || here[l] < least[l]) least[l] = here[l], best[l] = k;
      before = scale;
    }
    for (int l = 0; l < kLanes; l++) call.chosen[block[l]] = best[l];
  }
}

template <int64_t kVectors>
inline void codes_of(const float* values, const float* bounds, int32_t bound_count, uint8_t* codes) {
  Lanes x[kVectors];
  LaneBits code[kVectors];
  for (int64_t i = 0; i < kVectors; i++) x[i] = loaded(values + i * kLanes);
  for (int64_t i = 0; i < kVectors; i++) code[i] = LaneBits{} + static_cast<uint32_t>(bound_count);
  for (int32_t k = 0; k < bound_count; k++)
    for (int64_t i = 0; i < kVectors; i++) code[i] += reinterpret_cast<LaneBits>(x[i] <= all(bounds[k]));
  for (int64_t i = 0; i < kVectors; i++)
    for (int l = 0; l < kLanes; l++) codes[i * kLanes + l] = static_cast<uint8_t>(code[i][l]);
}

void table_codes_any(const float* values, int64_t count, const float* bounds, int32_t bound_count, uint8_t* codes) {
  constexpr int64_t kStep = kTogether * kLanes;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) codes_of<kTogether>(values + i, bounds, bound_count, codes + i);
  float rest[kStep] = {};
  uint8_t found[kStep];
  memcpy(rest, values + i, static_cast<size_t>(count - i) * sizeof(float));
  codes_of<kTogether>(rest, bounds, bound_count, found);
  memcpy(codes + i, found, static_cast<size_t>(count - i));
}

}  // namespace
}  // namespace fewbit
