// SPDX-License-Identifier: Apache-2.0
// FEWBIT_INT24 of FEWBIT_LUT of at most 4 bits, on FEWBIT_AVX2 and FEWBIT_SERIAL: it is products of levels and activations that are
// rounded to whole multiples of a power of two, one for each token and each segment (of at most 256 columns, as of
// fewbit_linear_int8),
//
//   s = 2^(e - 21) (bits 1: 2^(e - 20)), where 2^e <= P (1 + 2^-20) < 2^(e + 1), P = max|x| max|table|
//   q = round(table[code] x / s), halves to even
//
// and y is that of s * q, summed exactly within a segment. A product differs from s * q by at most s / 2 <= 2^-22 P (bits 1:
// 2^-21 P), or 2^-127. Blocks must be multiples of 32, or whole rows. The result is the same on every ISA, at any number of
// threads and tokens. Error beyond that: as of fewbit_linear_int8. NaN or infinity makes its token's results NaN.
#pragma once

#include <math.h>

#include "core/rounding.h"

namespace fewbit {
namespace {

// Entries of a table by a power of two, which leaves them below 2.
struct Levels24 {
  float level[16], most = 0;
  int exponent = 0;

  explicit inline Levels24(const SegmentTask& task) {
    for (int i = 0; i < 16; i++) {
      level[i] = task.entries[i & ((1 << task.bits) - 1)];
      most = fmaxf(most, fabsf(level[i]));
    }
    if (most > 0) exponent = ilogbf(most);
    for (float& entry : level) entry = ldexpf(entry, -exponent);
    most = ldexpf(most, -exponent);
  }
};

// What activations of a segment are multiplied by, and the step that their products with levels then count; NaN where one of
// them is NaN or infinity.
struct Unit24 {
  float inverse = 0, step = float_of(kNaNBits);

  // `most`: bits of the largest activation.
  inline Unit24(const SegmentTask& task, const Levels24& levels, int32_t most) {
    if (most >= kInfinityBits) return;
    const int bits = task.bits == 1 ? 21 : 22;  // half a byte is four codes of 1 bit, or two of 2
    const double product = static_cast<double>(float_of(static_cast<uint32_t>(most))) * levels.most * (1 + 0x1p-20);
    int exponent = (product > 0 ? ilogb(product) : -1000) + 1 - bits + levels.exponent;
    const int least = levels.exponent - 127 > -126 ? levels.exponent - 127 : -126;
    exponent = exponent > least ? exponent : least;
    step = ldexpf(1, exponent);
    inverse = ldexpf(1, levels.exponent - exponent);
  }
};

// A product to the nearest integer, halves to even; less than 2^22 in magnitude.
inline int32_t product24(float x, float level) {
  return static_cast<int32_t>(bits_of(__builtin_fmaf(x, level, kRound))) - kRoundBits;
}

// For each segment of a token: its unit, the sum of its activations, and what chunk(index, x, n) makes of n chunks of scaled
// activations.
template <class Chunk>
inline void products_of(const SegmentTask& task, const fewbit_input& x, int64_t token, const Levels24& levels, const Chunk& chunk) {
  const bool exists = token < x.tokens;
  for (int64_t s = 0, c = 0; s < task.segments; s++) {
    const int64_t end = c + task.segment_chunks < task.chunks ? c + task.segment_chunks : task.chunks;
    const int64_t first = c * 32, last = end * 32 < task.columns ? end * 32 : task.columns;
    const Unit24 unit(task, levels, exists ? largest(x, token, first, last - first) : 0);
    const float back = 1 / unit.step;
    float sum[8] = {};
    for (; c < end; c++) {
      float here[32] = {}, buffer[32];
      const int64_t left = task.columns - c * 32, count = left < 32 ? left : 32;
      if (exists && unit.inverse > 0)
        memcpy(here, floats(x, token, c * 32, count, buffer), static_cast<size_t>(count) * sizeof(float));
      for (int k = 0; k < 32; k++) sum[k % 8] += here[k] * back;
      for (int k = 0; k < 32; k++) here[k] *= unit.inverse;
      chunk(c, here);
    }
    task.x_scale[token * task.x_blocks + s] = unit.step;
    *sum_at(task, token, s) = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
}

}  // namespace
}  // namespace fewbit
