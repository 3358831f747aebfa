// SPDX-License-Identifier: Apache-2.0
#include "core/int8_vector.h"

#include "core/parts.h"

namespace fewbit {
namespace {


// Index of code `u` of a tile, column k of a chunk, among `bits` vectors (see fewbit_byte_vectors).
int index_of(const uint8_t* codes, int bits, int64_t u, int k) {
  const auto byte_of = [&](int vector) { return codes[vector * 64 + u * 4 + k % 4]; };
  int index = 0;
  if (bits == 6) {
    if (k < 24) return byte_of(k / 4) & 63;
    for (int p = 0; p < 3; p++) index |= byte_of((k - 24) / 4 * 3 + p) >> 6 << 2 * p;
    return index;
  }
  for (int p = 0; p < part_count(bits); p++) {
    const int width = part_width(bits, p), base = part_base(bits, p), shift = part_shift(width, k) % 8;
    index |= (byte_of(base + part_vector(width, k)) >> shift & ((1 << width) - 1)) << base;
  }
  return index;
}

// Index k of those that lie in `bits` bytes each eight.
int dense_index(const uint8_t* codes, int bits, int k) {
  int index = 0;
  for (int i = 0; i < bits; i++) {
    const int at = k * bits + i;
    index |= (codes[at / 8] >> at % 8 & 1) << i;
  }
  return index;
}

// The vectors of a tile's codes in column k of a chunk, of books that are wide: (16, dim).
void fetch_wide(const Int8VectorTask& task, int64_t tile, int64_t chunk, const uint8_t* book, int k,
                uint8_t (*out)[kMostDim]) {
  for (int64_t u = 0; u < 16; u++) {
    const uint8_t* codes = wide_codes_of(task, tile * 16 + u) + chunk * (task.bits + task.residual_bits) * 4;
    const uint8_t* first = book + dense_index(codes, task.bits, k) * task.width;
    const uint8_t* second = book + (task.width << task.bits);
    if (task.residual_bits) second += dense_index(codes + task.bits * 4, task.residual_bits, k) * task.width;
    for (int64_t d = 0; d < task.dim; d++)
      out[u][d] = static_cast<uint8_t>(first[d] + (task.residual_bits ? second[d] : 0));
  }
}

// The vectors of a tile's codes in column k of a chunk: (16, dim).
void fetch(const Int8VectorTask& task, int64_t tile, int64_t chunk, const uint8_t* book, int k, uint8_t (*out)[kMostDim]) {
  if (task.wide) return fetch_wide(task, tile, chunk, book, k, out);
  const uint8_t* codes = codes_of(task, tile) + chunk * chunk_bytes(task);
  for (int64_t u = 0; u < 16; u++) {
    const int first = index_of(codes, task.bits, u, k);
    const int second = task.residual_bits ? index_of(codes + task.bits * 64, task.residual_bits, u, k) : 0;
    for (int64_t d = 0; d < task.dim; d++) {
      const uint8_t* entries = book + d * task.entries;
      const int rest = task.residual_bits ? entries[task.dim * task.entries + second] : 0;
      out[u][d] = static_cast<uint8_t>(entries[first] + rest);
    }
  }
}

void run_tile(const Int8VectorTask& task, int64_t tile, int64_t token, int64_t tokens) {
  float totals[kMostTogether][kMostDim][16];
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t d = 0; d < task.dim; d++)
      for (int64_t u = 0; u < 16; u++) totals[m][d][u] = task.start[(token + m) * task.dim + d];
  const int8_t* x = activations_of<int8_t>(task, token);
  VectorSegment segment(task);
  for (int64_t s = 0, chunk = 0; s < task.segments; s++, segment.next()) {
    int32_t dot[kMostTogether][kMostDim][16] = {};
    for (int64_t c = 0; c < segment.chunks; c++, chunk++, x += task.together * 32)
      for (int k = 0; k < 32; k++) {
        uint8_t bytes[16][kMostDim];
        fetch(task, tile, chunk, segment.book, k, bytes);
        for (int64_t m = 0; m < tokens; m++)
          for (int64_t d = 0; d < task.dim; d++)
            for (int64_t u = 0; u < 16; u++) dot[m][d][u] += bytes[u][d] * x[m * 32 + k];
      }
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t d = 0; d < task.dim; d++)
        for (int64_t u = 0; u < 16; u++)
          totals[m][d][u] =
              __builtin_fmaf(segment.factor(token + m, d), static_cast<float>(dot[m][d][u]), totals[m][d][u]);
  }
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t d = 0; d < task.dim; d++) put<1>(task, tile, token + m, d, totals[m] + d);
}

void run(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  for (int64_t tile = tile_begin; tile < tile_end; tile++)
    for (int64_t token = 0; token < tokens; token += task.together)
      run_tile(task, tile, token, tokens - token < task.together ? tokens - token : task.together);
}

}  // namespace

const Int8VectorKernel int8_vector_linear_serial = {4, kMostTogether, sizeof(int8_t), round_for_vectors<int8_t>, run};

}  // namespace fewbit
