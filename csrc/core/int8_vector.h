// SPDX-License-Identifier: Apache-2.0
// y = x W^T for activations rounded to int8 and codes that index vectors of bytes, cut along the rows of W (see
// fewbit_byte_vectors). A tile is 16 codes of every column, 16 * dim rows. Included by every ISA's file, which offers
//
//   add_segment(task, tile, s, tokens, totals)    adds segment s of a tile of codes, of `tokens` tokens
//
// Sums over a segment are exact integers, at most 255 * 128 * 256 < 2^24, which float32 holds; what remains are the
// roundings written here, so that results are the same everywhere, bit for bit.
#pragma once

#include "core/kernel.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

// Of a token: rows of a code by codes of a tile.
using VectorTotals = float[kMostDim][16];

// Rounds a token, and begins its sums with what offsets contribute: the same for every code.
void round_for_vectors(const Int8VectorTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  float* start = task.start + token * task.dim;
  for (int d = 0; d < task.dim; d++) start[d] = 0;
  for (int64_t s = 0; s < task.segments; s++) {
    const float* offset = task.vector_offset + s / task.block_segments * task.dim;
    const float sum = task.sums[token * task.segments + s] * task.x_scale[token * task.x_blocks + s / task.x_block_segments];
    for (int d = 0; d < task.dim; d++) start[d] += offset[d] * sum;
  }
}

// What a segment's sum of bytes times activations is multiplied by before it is added, in one fused operation.
inline float factor(const Int8VectorTask& task, int64_t s, int64_t token, int64_t d) {
  return task.vector_step[s / task.block_segments * task.dim + d] *
         task.x_scale[token * task.x_blocks + s / task.x_block_segments];
}

inline int64_t chunks_of(const Int8VectorTask& task, int64_t s) {
  const int64_t left = task.chunks - s * task.segment_chunks;
  return left < task.segment_chunks ? left : task.segment_chunks;
}

// The codes of a chunk of a tile, in tile16; residual ones follow.
inline const uint8_t* codes_of(const Int8VectorTask& task, int64_t tile, int64_t chunk) {
  return task.codes + (tile * task.chunks + chunk) * (task.bits + task.residual_bits) * 64;
}

// Activations of `together` tokens from `token`, from a chunk on: (chunks, together, 32).
inline const int8_t* activations_of(const Int8VectorTask& task, int64_t token, int64_t chunk) {
  return static_cast<const int8_t*>(task.activations) + (token * task.chunks + chunk * task.together) * 32;
}

void add_segment(const Int8VectorTask& task, int64_t tile, int64_t s, int64_t tokens, VectorTotals* totals);

void int8_vector_run(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  alignas(64) VectorTotals totals[kRoundedTokens];
  const int64_t padded = (tokens + task.together - 1) / task.together * task.together;
  for (int64_t tile = tile_begin; tile < tile_end; tile++) {
    for (int64_t m = 0; m < padded; m++)
      for (int64_t d = 0; d < task.dim; d++)
        for (int64_t u = 0; u < 16; u++) totals[m][d][u] = task.start[m * task.dim + d];
    for (int64_t s = 0; s < task.segments; s++) add_segment(task, tile, s, padded, totals);
    const int64_t first = tile * 16 * task.dim, left = task.out_rows - first;
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t r = 0; r < 16 * task.dim && r < left; r++) {
        const float total = totals[m][r % task.dim][r / task.dim];
        write_float(task.y, task.y_dtype, m * task.y_stride + first + r, task.bias ? total + task.bias[first + r] : total);
      }
  }
}

}  // namespace
}  // namespace fewbit
