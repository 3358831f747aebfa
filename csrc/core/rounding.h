// SPDX-License-Identifier: Apache-2.0
// Activations to int8, exactly as the format int8/g{block}/sym of fewbit.formats does it:
//
//   scale = float16(clamp(2 max|x| / 255, 2^-24, 65504)),   q = clamp(round_half_even(x / scale + 128), 0, 255) - 128
//
// A block that holds NaN or infinity gets the scale NaN, which every output of its token inherits. Plain loops that
// compilers turn into the vectors of the file that includes this.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to integers

inline float half_of(float x) {
  if (!(x >= 6.103515625e-05f)) return (x + 0.5f) - 0.5f;  // subnormal halves are multiples of 2^-24
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float scale_of(const float* x, int64_t count) {
  constexpr int kChains = 16;
  float largest[kChains] = {}, poison[kChains] = {};
  int64_t k = 0;
  for (; k + kChains <= count; k += kChains)
    for (int i = 0; i < kChains; i++) {
      const float magnitude = x[k + i] < 0 ? -x[k + i] : x[k + i];
      largest[i] = largest[i] > magnitude ? largest[i] : magnitude;
      poison[i] += x[k + i] * 0.0f;
    }
  for (; k < count; k++) {
    const float magnitude = x[k] < 0 ? -x[k] : x[k];
    largest[0] = largest[0] > magnitude ? largest[0] : magnitude;
    poison[0] += x[k] * 0.0f;
  }
  float most = 0, sum = 0;
  for (int i = 0; i < kChains; i++) {
    most = most > largest[i] ? most : largest[i];
    sum += poison[i];
  }
  if (sum != 0.0f) return sum;  // NaN
  const float scale = 2 * most / 255;
  return half_of(scale < 5.9604644775390625e-08f ? 5.9604644775390625e-08f : scale > 65504.0f ? 65504.0f : scale);
}

// 32 activations; returns the sum of what they became.
template <class X>
inline int32_t round_chunk(const float* x, float scale, X* out) {
  int32_t sum = 0;
  for (int k = 0; k < 32; k++) {
    float v = x[k] / scale + 128.0f;
    v = v > 0.0f ? v : 0.0f;  // NaN becomes 0: the scale is NaN then
    v = v < 255.0f ? v : 255.0f;
    const int32_t q = static_cast<int32_t>((v + kRound) - kRound) - 128;
    out[k] = static_cast<X>(q);
    sum += q;
  }
  return sum;
}

template <class X>
void round_token(const Int8Task& task, const float* x, int64_t token) {
  const int64_t apart = task.together * 32;
  X* out = static_cast<X*>(task.activations);
  out += (token / task.together * task.chunks * task.together + token % task.together) * 32;
  float* sums = task.sums + token * task.segments;
  float* scales = task.x_scale + token * task.x_blocks;
  for (int64_t s = 0; s < task.segments; s++) {
    const int64_t first = s * task.segment_chunks * 32, block = s / task.x_block_segments;
    if (x && s % task.x_block_segments == 0) {
      const int64_t whole = task.x_block_segments * task.segment_chunks * 32, left = task.columns - first;
      scales[block] = scale_of(x + first, left < whole ? left : whole);
    }
    if (!x) scales[block] = 0;
    const int64_t left = task.chunks - s * task.segment_chunks;
    const int64_t chunks = left < task.segment_chunks ? left : task.segment_chunks;
    int32_t sum = 0;
    for (int64_t c = 0; c < chunks; c++, out += apart) {
      const int64_t column = first + c * 32;
      if (!x) {
        memset(out, 0, 32 * sizeof(X));
      } else if (column + 32 <= task.columns) {
        sum += round_chunk(x + column, scales[block], out);
      } else {
        float rest[32] = {};
        memcpy(rest, x + column, static_cast<size_t>(task.columns - column) * sizeof(float));
        sum += round_chunk(rest, scales[block], out);
      }
    }
    sums[s] = static_cast<float>(sum);
  }
}

}  // namespace
}  // namespace fewbit
