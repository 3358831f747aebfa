// SPDX-License-Identifier: Apache-2.0
// Activations to int8, exactly as the format int8/g{block}/sym of fewbit.formats does it:
//
//   scale = float16(clamp(2 max|x| / 255, 2^-24, 65504)),   q = clamp(round_half_even(x / scale + 128), 0, 255) - 128
//
// A block that holds NaN or infinity gets the scale NaN, which every output of its token inherits. Where the source gives
// a scale, that and its zero take the places of the scale and of 128 in x / scale + 128. Plain loops that compilers turn
// into the vectors of the file that includes this.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/nearest.h"

namespace fewbit {
namespace {

// Bits of the largest magnitude, which are in the order of the magnitudes, of columns [first, first + count) of a token.
inline int32_t largest(const fewbit_input& source, int64_t token, int64_t first, int64_t count) {
  int32_t most = 0;
  float buffer[kSegment];
  for (int64_t begin = 0; begin < count; begin += kSegment) {
    const int64_t here = count - begin < kSegment ? count - begin : kSegment;
    const float* x = floats(source, token, first + begin, here, buffer);
    for (int64_t k = 0; k < here; k++) {
      const int32_t magnitude = static_cast<int32_t>(bits_of(x[k]) & 0x7fffffffu);
      most = most > magnitude ? most : magnitude;
    }
  }
  return most;
}

// Scale of columns [first, first + count) of a token.
inline float scale_of(const fewbit_input& source, int64_t token, int64_t first, int64_t count) {
  const int32_t most = largest(source, token, first, count);
  if (most >= kInfinityBits) return float_of(kNaNBits);
  if (source.scale != 0) return source.scale;
  const float scale = 2 * float_of(static_cast<uint32_t>(most)) / 255;
  const float least = 5.9604644775390625e-08f, clamped = scale < least ? least : scale > 65504.0f ? 65504.0f : scale;
  return from_float16(to_float16(clamped));
}

// 32 activations; returns the sum of what they became.
template <class X>
inline int32_t round_chunk(const float* x, float scale, float zero, X* out) {
  int32_t q[32], sum = 0;
  for (int k = 0; k < 32; k++) {
    int32_t bits = static_cast<int32_t>(bits_of(x[k] / scale + zero + kRound));
    bits = bits > kRoundBits ? bits : kRoundBits;
    bits = bits < kRoundBits + 255 ? bits : kRoundBits + 255;
    q[k] = bits - kRoundBits - 128;
  }
  for (int k = 0; k < 32; k++) sum += q[k];
  for (int k = 0; k < 32; k++) out[k] = static_cast<X>(q[k]);
  return sum;
}

// Where a row of activations lies.
template <class X>
X* row_of(const SegmentTask& task, int64_t row) {
  const int64_t first = row / task.together * task.chunks * task.together + row % task.together;
  return static_cast<X*>(task.activations) + first * 32;
}

// Where the sum of a row's segment lies.
inline float* sum_at(const SegmentTask& task, int64_t row, int64_t segment) {
  return task.sums + (row / task.together * task.segments + segment) * task.together + row % task.together;
}

template <class X>
void round_token(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  const int64_t apart = task.together * 32;
  X* out = row_of<X>(task, token);
  float* scales = task.x_scale + token * task.x_blocks;
  const bool exists = token < x.tokens;
  const float zero = x.scale != 0 ? static_cast<float>(x.zero) : 128.0f;
  for (int64_t s = 0; s < task.segments; s++) {
    const int64_t first = s * task.segment_chunks * 32, block = s / task.x_block_segments;
    if (exists && s % task.x_block_segments == 0) {
      const int64_t whole = task.x_block_segments * task.segment_chunks * 32, left = task.columns - first;
      scales[block] = scale_of(x, token, first, left < whole ? left : whole);
    }
    if (!exists) scales[block] = 0;
    const int64_t left = task.chunks - s * task.segment_chunks;
    const int64_t chunks = left < task.segment_chunks ? left : task.segment_chunks;
    int32_t sum = 0;
    for (int64_t c = 0; c < chunks; c++, out += apart) {
      const int64_t column = first + c * 32;
      float buffer[32];
      if (!exists) {
        memset(out, 0, 32 * sizeof(X));
      } else if (column + 32 <= task.columns) {
        sum += round_chunk(floats(x, token, column, 32, buffer), scales[block], zero, out);
      } else {
        const int64_t few = task.columns - column;
        float rest[32] = {};
        memcpy(rest, floats(x, token, column, few, buffer), static_cast<size_t>(few) * sizeof(float));
        for (int64_t k = few; k < 32; k++) rest[k] = (128.0f - zero) * scales[block];  // what becomes 0
        sum += round_chunk(rest, scales[block], zero, out);
      }
    }
    *sum_at(task, token, s) = static_cast<float>(sum);
  }
}

}  // namespace
}  // namespace fewbit
