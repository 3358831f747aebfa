// SPDX-License-Identifier: Apache-2.0
// y = x W^T for activations rounded to int8 and codes that index vectors of bytes, cut along the rows of W (see
// fewbit_byte_vectors). A tile is 16 codes of every column, 16 * dim rows. Sums over a segment are exact integers, at
// most 255 * 128 * 256 < 2^24, which float32 holds, or, of whole rows of wide books, 255 * 128 * 2^16 < 2^31, which int32
// holds. What remains are the roundings written here, so that results are the same everywhere, bit for bit: sums begin
// with what offsets contribute, and each segment's sum of bytes times activations is multiplied by a factor and added in
// one fused operation.
#pragma once

#include "core/kernel.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

// Rounds a token, and begins its sums with what offsets contribute: the same for every code.
template <class X>
void round_for_vectors(const Int8VectorTask& task, const fewbit_input& x, int64_t token) {
  round_token<X>(task, x, token);
  float* start = task.start + token * task.dim;
  for (int d = 0; d < task.dim; d++) start[d] = 0;
  for (int64_t s = 0; s < task.segments; s++) {
    const float* offset = task.vector_offset + s / task.block_segments * task.dim;
    const float sum = *sum_at(task, token, s) * task.x_scale[token * task.x_blocks + s / task.x_block_segments];
    for (int d = 0; d < task.dim; d++) start[d] += offset[d] * sum;
  }
}

// Goes through the segments of `task`.
struct VectorSegment {
  const uint8_t* book;
  const float *step, *x_scale;
  int64_t x_blocks, chunks;  // chunks: of this segment
  bool enters;               // whether it is the first of its block

  explicit VectorSegment(const Int8VectorTask& t)
      : book(t.book), step(t.vector_step), x_scale(t.x_scale), x_blocks(t.x_blocks), chunks(0), enters(true), task(t),
        left(t.chunks), block_left(t.block_segments), x_left(t.x_block_segments) {
    measure();
  }
  void next() {
    enters = --block_left == 0;
    if (enters) book += task.book_bytes, step += task.dim, block_left = task.block_segments;
    if (--x_left == 0) x_scale++, x_left = task.x_block_segments;
    measure();
  }
  // Of row d of a code, for a token.
  inline float factor(int64_t token, int64_t d) const { return step[d] * x_scale[token * x_blocks]; }

 private:
  void measure() {
    chunks = left < task.segment_chunks ? left : task.segment_chunks;
    left -= chunks;
  }

  const Int8VectorTask& task;
  int64_t left, block_left, x_left;
};

// Bytes of a chunk of a tile.
inline int64_t chunk_bytes(const Int8VectorTask& task) { return (task.bits + task.residual_bits) * 64; }

// A tile's codes: chunks of indices in tile16, each followed by one of indices into the residual book.
inline const uint8_t* codes_of(const Int8VectorTask& task, int64_t tile) {
  return task.codes + tile * task.chunks * chunk_bytes(task);
}

// One code's where books are wide: chunks of 32 indices, each followed by those into the residual book.
inline const uint8_t* wide_codes_of(const Int8VectorTask& task, int64_t code) {
  return task.codes + code * task.chunks * (task.bits + task.residual_bits) * 4;
}

// Activations of `together` tokens from `token`: (chunks, together, 32).
template <class X>
const X* activations_of(const Int8VectorTask& task, int64_t token) {
  return static_cast<const X*>(task.activations) + token * task.chunks * 32;
}

// The rows of one code of one token to y, the bias added. A call of its own, as that is often and slight work.
FEWBIT_APART inline void put_code(const Int8VectorTask& task, int64_t code, int64_t token, const float* total) {
  const int64_t row = code * task.dim, left = task.out_rows - row;
  for (int64_t d = 0; d < task.dim && d < left; d++) {
    const float y = task.bias ? total[d] + task.bias[row + d] : total[d];
    if (task.y_dtype == FEWBIT_FLOAT32) static_cast<float*>(task.y)[token * task.y_stride + row + d] = y;
    else write_float(task.y, task.y_dtype, token * task.y_stride + row + d, y);
  }
}

// Rows [d, d + T) of a tile's 16 codes, of one token, to y, the bias added.
template <int T>
void put(const Int8VectorTask& task, int64_t tile, int64_t token, int64_t d, const float (*total)[16]) {
  int64_t row = tile * 16 * task.dim + d;
  for (int64_t u = 0; u < 16; u++, row += task.dim)
    for (int64_t t = 0; t < T && row + t < task.out_rows; t++) {
      const float y = task.bias ? total[t][u] + task.bias[row + t] : total[t][u];
      if (task.y_dtype == FEWBIT_FLOAT32) static_cast<float*>(task.y)[token * task.y_stride + row + t] = y;
      else write_float(task.y, task.y_dtype, token * task.y_stride + row + t, y);
    }
}

}  // namespace
}  // namespace fewbit
