// SPDX-License-Identifier: Apache-2.0
// Decoded codes times activations where products are summed in lanes too narrow for a segment: span by span. For an operand
// whose Sum (see segments.h) offers
//
//   kSpan                  groups of four columns that a narrow sum takes
//   add(narrow, u, x)      adds products of a plane's four columns and activations
//   less(narrow, u)        what narrow sums of the codes u begin with, for any activations
//   flush(narrow)          adds them to the sums of a segment
#pragma once

#include <stdint.h>

#include <type_traits>

#include "core/inline.h"

namespace fewbit {
namespace {

template <class Sum, class = void>
constexpr int kSpanOf = 0;
template <class Sum>
constexpr int kSpanOf<Sum, std::void_t<decltype(Sum::kSpan)>> = Sum::kSpan;

// What the sums of each span of a part begin with: (planes, spans, T).
template <class K, int T>
struct Starts {
  static constexpr int kGroups = kSpanOf<typename K::Sum>, kSpans = kGroups ? 64 / kGroups : 0;
  U first[K::kPlanes][kSpans ? kSpans : 1][T];
};

constexpr int kNarrow = 8;  // sums that registers hold

// Adds the products of `chunks` decoded chunks of T row groups and M tokens to `dot`. `bytes`: (planes `apart` bytes apart,
// groups of four columns, T, lanes).
template <class K, int T, int M>
FEWBIT_INLINE void multiply_spans(const uint8_t* bytes, int64_t apart, const Starts<K, T>& starts, int64_t chunks,
                                  const typename K::X* x, typename K::Sum (&dot)[T][M][K::kPlanes]) {
  using Sum = typename K::Sum;
  constexpr int P = K::kPlanes, H = kNarrow / (T * P), kGroups = Sum::kSpan < 8 ? Sum::kSpan : 8, kChunks = (Sum::kSpan + 7) / 8;
  for (int m0 = 0; m0 < M; m0 += H) {
    const uint8_t* codes = bytes;
    const typename K::X* here = x + m0 * 32;
    const auto* start = &starts.first[0][0];
    for (int64_t c = 0; c < chunks;) {
      const int64_t end = c + kChunks < chunks ? c + kChunks : chunks;
#pragma GCC unroll 1
      for (int begin = 0; begin < 8; begin += kGroups, start++) {
        U narrow[T][H][P];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 8
          for (int h = 0; h < H; h++)
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) narrow[t][h][p] = start[p * Starts<K, T>::kSpans][t];
        int64_t i = c;
        do {
#pragma GCC unroll 8
          for (int g = 0; g < kGroups; g++) {
            U u[T][P];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++)
#pragma GCC unroll 2
              for (int p = 0; p < P; p++) u[t][p] = load_lanes(codes + p * apart + (g * T + t) * kLanes * 4);
#pragma GCC unroll 8
            for (int h = 0; h < H; h++) {
              const U lanes = Sum::four(here + h * 32 + g * 4);
#pragma GCC unroll 8
              for (int t = 0; t < T; t++)
#pragma GCC unroll 2
                for (int p = 0; p < P; p++) Sum::add(narrow[t][h][p], u[t][p], lanes);
            }
          }
          codes += kGroups * T * kLanes * 4;
          here += kGroups == 8 ? M * 32 : kGroups * 4;
        } while (kGroups == 8 && ++i < end);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 8
          for (int h = 0; h < H; h++)
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) dot[t][m0 + h][p].flush(narrow[t][h][p]);
      }
      if (kGroups < 8) here += (M - 1) * 32;
      c = end;
    }
  }
}

}  // namespace
}  // namespace fewbit
