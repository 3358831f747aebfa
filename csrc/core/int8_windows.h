// SPDX-License-Identifier: Apache-2.0
// The loop of fewbit_int8_windows, over the vector type of the file that includes this, after that file's simd.h and its
// quotient(). A vector holds output positions, each with a window and a scale of its own: what a window's inputs become
// depends on all of it, so each is rounded anew for each window that sees it. The compiler's vector extension does the
// integer work.
#pragma once

#include <stdint.h>

#include "core/inline.h"
#include "core/nearest.h"
#include "core/windows.h"

namespace fewbit {
namespace {

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));

constexpr int kPositions = kVectors * kLanes;
static_assert(kMostPositions % kPositions == 0, "positions come in whole steps");

constexpr int32_t kMagnitude = 0x7fffffff;

FEWBIT_INLINE Lanes bits_of(F x) { return reinterpret_cast<Lanes>(x); }
FEWBIT_INLINE F floats_of(Lanes bits) { return reinterpret_cast<F>(bits); }
FEWBIT_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
FEWBIT_INLINE Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }

// x of [2^-24, 65504] to the nearest float16, ties to even. Halves below 2^-14 are multiples of 2^-24, to which adding
// 0.5 rounds.
FEWBIT_INLINE F half(F x) {
  const Lanes bits = bits_of(x), normal = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff;
  return bits < 0x38800000 ? (x + 0.5f) - 0.5f : floats_of(normal);
}

// The scale of int8 for windows of which these are the bits of the largest magnitudes; NaN where that is not finite.
FEWBIT_INLINE F scale_of(Lanes most) {
  const F least = broadcast(5.9604644775390625e-08f), largest = broadcast(65504.0f);
  const F scale = quotient(floats_of(most), broadcast(127.5f), broadcast(1 / 127.5f));
  const F clamped = scale < least ? least : scale > largest ? largest : scale;
  return most >= kInfinityBits ? floats_of(Lanes{} + static_cast<int32_t>(kNaNBits)) : half(clamped);
}

// clamp(round_half_even(x / scale + 128), 0, 255) - 128, as a float: see nearest.h.
FEWBIT_INLINE F rounded_to(F x, F scale, F inverse) {
  const Lanes bits = bits_of(quotient(x, scale, inverse) + 128.0f + kRound);
  return floats_of(smaller(larger(bits, Lanes{} + kRoundBits), Lanes{} + (kRoundBits + 255))) - (kRound + 128.0f);
}

FEWBIT_INLINE void finish(const WindowsTask& task, int64_t row, int64_t first, const F* sum, const F* scale) {
  const F bias = broadcast(task.bias ? task.bias[row] : 0.0f);
  float* out = task.out + row * task.positions + first;
  for (int v = 0; v < kVectors; v++) store(out + v * kLanes, add(multiply(sum[v], scale[v]), bias));
}

// R rows from `row`, of the positions from `first`.
template <int R>
FEWBIT_INLINE void multiply_rows(const WindowsTask& task, int64_t row, int64_t first, const F* scale) {
  const float* weight = task.weight + row * task.columns;
  F sum[R][kVectors];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kVectors; v++) sum[r][v] = broadcast(0.0f);
  for (int64_t k = 0; k < task.columns; k++) {
    F x[kVectors];
    for (int v = 0; v < kVectors; v++) x[v] = load(task.rounded + k * kPositions + v * kLanes);
    for (int r = 0; r < R; r++) {
      const F w = broadcast(weight[r * task.columns + k]);
      for (int v = 0; v < kVectors; v++) sum[r][v] = add(sum[r][v], multiply(w, x[v]));
    }
  }
  for (int r = 0; r < R; r++) finish(task, row + r, first, sum[r], scale);
}

// The only row: what windows become is multiplied where it stands.
FEWBIT_INLINE void multiply_row(const WindowsTask& task, int64_t first, const F* scale, const F* inverse) {
  F sum[kVectors];
  for (int v = 0; v < kVectors; v++) sum[v] = broadcast(0.0f);
  for (int64_t k = 0; k < task.columns; k++) {
    const F w = broadcast(task.weight[k]);
    const float* x = task.panel + first + task.tap[k];
    for (int v = 0; v < kVectors; v++)
      sum[v] = add(sum[v], multiply(w, rounded_to(load(x + v * kLanes), scale[v], inverse[v])));
  }
  finish(task, 0, first, sum, scale);
}

inline void windows_run(const WindowsTask& task) {
  for (int64_t first = 0; first < task.positions; first += kPositions) {
    const float* panel = task.panel + first;
    Lanes most[kVectors] = {};
    for (int64_t k = 0; k < task.columns; k++)
      for (int v = 0; v < kVectors; v++)
        most[v] = larger(most[v], bits_of(load(panel + task.tap[k] + v * kLanes)) & kMagnitude);
    F scale[kVectors], inverse[kVectors];
    for (int v = 0; v < kVectors; v++) scale[v] = scale_of(most[v]), inverse[v] = 1.0f / scale[v];
    if (task.rows == 1) {
      multiply_row(task, first, scale, inverse);
      continue;
    }
    for (int64_t k = 0; k < task.columns; k++)
      for (int v = 0; v < kVectors; v++)
        store(task.rounded + k * kPositions + v * kLanes,
              rounded_to(load(panel + task.tap[k] + v * kLanes), scale[v], inverse[v]));
    int64_t row = 0;
    for (; row + 4 <= task.rows; row += 4) multiply_rows<4>(task, row, first, scale);
    for (; row < task.rows; row++) multiply_rows<1>(task, row, first, scale);
  }
}

}  // namespace
}  // namespace fewbit
