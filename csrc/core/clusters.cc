// SPDX-License-Identifier: Apache-2.0
// Clusters of sorted numbers by dynamic programming: see fewbit_clusters. Division by division as src/fewbit/core/scalars.py
// does it in torch, which is the reference, so that both give the same bits.
#include <stdint.h>

#include <algorithm>

#include "fewbit.h"
#include "fewbit_grids.h"

namespace {

constexpr double kFloor = 1.0 / (int64_t{1} << 48);

struct Sums {
  const double *s0, *s1, *s2;
};

// What the values first .. right - 1 save by having a center, of every first from `low` to `high`, taken from `before`.
void fill(const double* before, Sums s, int64_t right, int64_t low, int64_t high, double* tried) {
  const double mass = s.s0[right], sum = s.s1[right];
  for (int64_t l = low; l <= high; ++l) {
    const double moment = sum - s.s1[l], apart = mass - s.s0[l];
    tried[l - low] = before[l] - moment * moment / (apart > kFloor ? apart : kFloor);
  }
}

// least[r]: the smallest of `tried` for r. The best first value never falls as r grows: between those of r's neighbours,
// which were found before, nothing else is tried.
void layer(const double* before, Sums s, int64_t size, int64_t* best, double* tried, double* least) {
  least[0] = before[0], best[0] = 0;
  int64_t stride = 1;
  while (2 * stride <= size - 1) stride *= 2;
  for (; stride; stride /= 2) {
    for (int64_t r = stride; r < size; r += 2 * stride) {
      const int64_t low = best[r - stride], high = r + stride < size ? std::min(best[r + stride], r) : r;
      fill(before, s, r, low, high, tried);
      const double* found = std::min_element(tried, tried + (high - low + 1));
      least[r] = *found, best[r] = low + (found - tried);
    }
  }
}

// begins[k]: where cluster k begins.
void cut(Sums s, int64_t size, int64_t count, int64_t* begins, int64_t* best, double* scratch) {
  double *tried = scratch, *before = tried + size, *costs = before + size;
  for (int64_t r = 0; r < size; ++r) costs[r] = s.s2[r] - s.s1[r] * s.s1[r] / std::max(s.s0[r], kFloor);
  for (int64_t k = 2; k < count; ++k) {
    double *last = costs + (k - 2) * size, *next = last + size;
    for (int64_t r = 0; r < size; ++r) before[r] = last[r] - s.s2[r];
    layer(before, s, size, best, tried, next);
    for (int64_t r = 0; r < size; ++r) next[r] += s.s2[r];
  }
  int64_t right = size - 1;
  for (int64_t k = count - 1; k > 0; --k) {
    const double* last = costs + (k - 1) * size;
    for (int64_t r = 0; r <= right; ++r) before[r] = last[r] - s.s2[r];
    fill(before, s, right, 0, right, tried);
    right = std::min_element(tried, tried + right + 1) - tried;
    begins[k] = right;
  }
  begins[0] = 0;
}

}  // namespace

extern "C" int fewbit_clusters(const fewbit_clusters_call* call) {
  const auto& c = *call;
  if (!c.s0 || !c.s1 || !c.s2 || !c.begins || !c.best || !c.scratch || c.tables < 0 || c.count < 1 || c.size <= c.count)
    return FEWBIT_BAD_ARGUMENT;
  for (int64_t t = 0; t < c.tables; ++t) {
    const int64_t at = t * c.size;
    cut({c.s0 + at, c.s1 + at, c.s2 + at}, c.size, c.count, c.begins + t * c.count, c.best, c.scratch);
  }
  return FEWBIT_OK;
}
