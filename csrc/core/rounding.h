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
inline int32_t divide_chunk(const float* x, float scale, float zero, X* out) {
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

// The same of many that follow one another, `apart` from one to the next once rounded. An instruction set may have its own.
template <class X>
inline int32_t round_chunks(const float* x, float scale, float zero, int64_t chunks, X* out, int64_t apart) {
  int32_t sum = 0;
  for (; chunks > 0; chunks--, x += 32, out += apart) sum += divide_chunk(x, scale, zero, out);
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
  float *scale = task.x_scale + token * task.x_blocks, *sums = sum_at(task, token, 0);
  const bool exists = token < x.tokens, stands = exists && x.dtype == FEWBIT_FLOAT32 && x.step == 1;
  const float zero = x.scale != 0 ? static_cast<float>(x.zero) : 128.0f;
  int64_t first = 0, shared = 0;  // columns before the segment, segments before it that share its scale
  for (int64_t s = 0; s < task.segments; s++, first += task.segment_chunks * 32, sums += task.together) {
    if (shared == task.x_block_segments) scale++, shared = 0;
    if (shared++ == 0) {
      const int64_t whole = task.x_block_segments * task.segment_chunks * 32, left = task.columns - first;
      *scale = exists ? scale_of(x, token, first, left < whole ? left : whole) : 0;
    }
    const int64_t left = task.chunks - s * task.segment_chunks, chunks = left < task.segment_chunks ? left : task.segment_chunks;
    const int64_t full = (task.columns - first) / 32, ready = !stands ? 0 : full < chunks ? full : chunks;
    float buffer[32];
    int32_t sum = ready ? round_chunks(floats(x, token, first, 32, buffer), *scale, zero, ready, out, apart) : 0;
    out += ready * apart;
    for (int64_t c = ready; c < chunks; c++, out += apart) {
      const int64_t column = first + c * 32, few = task.columns - column;
      if (!exists) {
        memset(out, 0, 32 * sizeof(X));
      } else if (few >= 32) {
        sum += round_chunks(floats(x, token, column, 32, buffer), *scale, zero, 1, out, apart);
      } else {
        float rest[32] = {};
        memcpy(rest, floats(x, token, column, few, buffer), static_cast<size_t>(few) * sizeof(float));
        for (int64_t k = few; k < 32; k++) rest[k] = (128.0f - zero) * *scale;  // what becomes 0
        sum += round_chunks(rest, *scale, zero, 1, out, apart);
      }
    }
    *sums = static_cast<float>(sum);
  }
}

}  // namespace
}  // namespace fewbit
