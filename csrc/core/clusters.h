// SPDX-License-Identifier: Apache-2.0
// Clusters of sorted numbers.
#pragma once

#include <stdint.h>

namespace fewbit {

// What weighs less than that, next to the heaviest number, is lost in the sums.
constexpr double kFloor = 1.0 / (int64_t{1} << 48);

// Numbers x (n), ascending, and weights, and these times the numbers and their squares, added up to each number: (n + 1).
struct Sums {
  int64_t n;
  const double *x, *s0, *s1, *s2;
};

// begins (count): where each of `count` clusters begins, fewer than there are numbers, so that the sum over clusters of
// S2 - S1^2 / S0 is least. Throws std::bad_alloc.
void clusters(const Sums& sums, int64_t count, int64_t* begins);

}  // namespace fewbit
