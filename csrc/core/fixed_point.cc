// SPDX-License-Identifier: Apache-2.0
#include <math.h>

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr double kMost = 32767;

// The largest step that both a and b are whole multiples of, or something below `least` where that one is.
double common(double a, double b, double least) {
  while (b != 0 && a >= least) {
    const double rest = fmod(a, b);
    a = b;
    b = rest;
  }
  return a;
}

}  // namespace

bool fixed_point(const float* table, int32_t bits, FixedPoint* out) {
  const int32_t levels = 1 << bits;
  double largest = 0;
  for (int32_t i = 0; i < levels; i++) {
    if (!isfinite(table[i])) return false;
    largest = fmax(largest, fabs(table[i]));
  }
  const double least = largest / kMost;
  double step = largest;
  for (int32_t i = 0; i < levels && step >= least; i++) step = common(step, fabs(table[i]), least);
  if (step == 0) step = 1;
  if (step < least) step = least;
  out->step = static_cast<float>(step);  // a common step is a float32; another one is rounded up, to stay within kMost
  if (out->step < step) out->step = nextafterf(out->step, INFINITY);
  out->most = 0;
  for (int32_t i = 0; i < levels; i++) {
    out->level[i] = static_cast<int16_t>(rint(table[i] / static_cast<double>(out->step)));
    out->most = out->level[i] > out->most ? out->level[i] : -out->level[i] > out->most ? -out->level[i] : out->most;
  }
  return true;
}

}  // namespace fewbit
