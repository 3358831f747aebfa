// SPDX-License-Identifier: Apache-2.0
// Decoded codes times the activations of two tokens at once, where an operand's Sum (see segments.h) offers
//
//   Rows(first, second)   eight columns of some rows, from a vector of four and that of the next four
//   Pair                  sums of two tokens: add(rows, x, next) with eight activations of either, of(0 or 1) one's sums
#pragma once

#include <stdint.h>

#include <type_traits>

#include "core/inline.h"

namespace fewbit {
namespace {

template <class Sum, class = void>
constexpr bool kHasPairs = false;
template <class Sum>
constexpr bool kHasPairs<Sum, std::void_t<typename Sum::Pair>> = true;

// Sets `dot` to the sums of `chunks` decoded chunks of T row groups x M tokens.
template <class K, int T, int M>
FEWBIT_INLINE void multiply_pairs(const uint8_t* const (&bytes)[K::kPlanes][T], int64_t apart, int64_t chunks, const int8_t* x,
                                  typename K::Sum (&dot)[T][M][K::kPlanes]) {
  constexpr int P = K::kPlanes;
  static_assert(M % 2 == 0 && K::kApart == 0, "tokens come in pairs, planes share their activations");
  typename K::Sum::Pair pair[T][M / 2][P];
  for (int64_t c = 0; c < chunks; c++, x += M * 32)
#pragma GCC unroll 1
    for (int g = 0; g < 8; g += 2) {
      typename K::Sum::Rows rows[T][P];
      for (int t = 0; t < T; t++)
        for (int p = 0; p < P; p++) {
          const uint8_t* here = bytes[p][t] + (c * 8 + g) * apart;
          rows[t][p] = {load_lanes(here), load_lanes(here + apart)};
        }
      for (int m = 0; m < M; m += 2)
        for (int t = 0; t < T; t++)
          for (int p = 0; p < P; p++)
            pair[t][m / 2][p].add(rows[t][p], x + m * 32 + g * 4, x + (m + 1) * 32 + g * 4);
    }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++) dot[t][m][p].sum = pair[t][m / 2][p].of(m % 2);
}

}  // namespace
}  // namespace fewbit
