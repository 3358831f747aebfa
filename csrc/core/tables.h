// SPDX-License-Identifier: Apache-2.0
// Parts of 1 and 2 bits where a vector holds 16 floats: instead of decoding 4 (or 2) columns one by one, look up the
// sum of their products. For every 4 bits of code the panel holds the 16 possible sums
//
//   T[i] = sum over the digits d of i of level[d] * x[column of the digit]        (the idea of T-MAC, kept in float32)
//
// built once per token and used by every row: one shift, one lookup and one addition per 4 one-bit weights.
#pragma once

#include "core/linear.h"

namespace fewbit {
namespace {

constexpr int table_floats(int width) { return width * 8 * 16; }

template <int WIDTH, int T, int M>
FEWBIT_INLINE void table_chunk(const uint8_t* const (&codes)[T], int vector, const float* const (&panel)[M],
                               int at, F (&acc)[T][M]) {
#pragma GCC unroll kUnroll
  for (int j = 0; j < WIDTH; j++) {
    U lanes[T];
    for (int t = 0; t < T; t++) lanes[t] = load_lanes(codes[t] + (vector + j) * 64);
#pragma GCC unroll kUnroll
    for (int n = 0; n < 8; n++) {
      F table[M];
      for (int m = 0; m < M; m++) table[m] = load(panel[m] + at + (j * 8 + n) * 16);
      for (int t = 0; t < T; t++) {
        const U index = shift_right(lanes[t], 4 * n);
        for (int m = 0; m < M; m++) acc[t][m] = add(acc[t][m], lookup16(table[m], index));
      }
    }
  }
}

// Activations of one chunk in the order in which a part of WIDTH bits holds their columns.
template <int WIDTH>
FEWBIT_INLINE void place(const float (&x)[32], float (&out)[32]) {
  for (int k = 0; k < 32; k++) out[k] = x[part_column(WIDTH, k * WIDTH / 32, k % (32 / WIDTH))];
}

// The tables of one chunk of placed activations: levels has 2^WIDTH entries, out gets table_floats(WIDTH).
template <int WIDTH>
FEWBIT_INLINE void table_panel(const float* levels, const float (&x)[32], float* out) {
  constexpr int kDigits = 4 / WIDTH;
  F digit[kDigits];
  for (int d = 0; d < kDigits; d++) {
    float values[16];
    for (int i = 0; i < 16; i++) values[i] = levels[(i >> (d * WIDTH)) & ((1 << WIDTH) - 1)];
    digit[d] = load(values);
  }
  for (int n = 0; n < 8 * WIDTH; n++) {
    F sum = multiply(digit[0], broadcast(x[n * kDigits]));
    for (int d = 1; d < kDigits; d++) sum = fma(digit[d], broadcast(x[n * kDigits + d]), sum);
    store(out + n * 16, sum);
  }
}

// Of activations in their own order.
template <int WIDTH>
FEWBIT_INLINE void table_panel_of(const float* levels, const float (&x)[32], float* out) {
  float placed[32];
  place<WIDTH>(x, placed);
  table_panel<WIDTH>(levels, placed, out);
}

}  // namespace
}  // namespace fewbit
