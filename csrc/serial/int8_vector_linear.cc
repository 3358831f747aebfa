// SPDX-License-Identifier: Apache-2.0
#include "core/int8_vector.h"

#include "core/parts.h"

namespace fewbit {
namespace {

// Index of code `u` of a tile, column k of a chunk, among `bits` vectors of tile16.
int index_of(const uint8_t* codes, int bits, int64_t u, int k) {
  int index = 0;
  for (int p = 0; p < part_count(bits); p++) {
    const int width = part_width(bits, p), base = part_base(bits, p), shift = part_shift(width, k);
    const uint8_t byte = codes[(base + part_vector(width, k)) * 64 + u * 4 + shift / 8];
    index |= (byte >> shift % 8 & ((1 << width) - 1)) << base;
  }
  return index;
}

// The vectors of a tile's codes in one column: (16, dim).
void fetch(const Int8VectorTask& task, const uint8_t* codes, const uint8_t* book, int k, uint8_t (*out)[kMostDim]) {
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

void add_segment(const Int8VectorTask& task, int64_t tile, int64_t s, int64_t tokens, VectorTotals* totals) {
  int32_t dot[kRoundedTokens][kMostDim][16];
  memset(dot, 0, static_cast<size_t>(tokens) * sizeof dot[0]);
  const uint8_t* book = task.book + s / task.block_segments * task.books * task.dim * task.entries;
  for (int64_t c = 0; c < chunks_of(task, s); c++) {
    const int64_t chunk = s * task.segment_chunks + c;
    for (int k = 0; k < 32; k++) {
      uint8_t bytes[16][kMostDim];
      fetch(task, codes_of(task, tile, chunk), book, k, bytes);
      for (int64_t m = 0; m < tokens; m++) {
        const int64_t group = m / task.together * task.together;
        const int32_t x = activations_of(task, group, chunk)[(m - group) * 32 + k];
        for (int64_t d = 0; d < task.dim; d++)
          for (int64_t u = 0; u < 16; u++) dot[m][d][u] += bytes[u][d] * x;
      }
    }
  }
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t d = 0; d < task.dim; d++)
      for (int64_t u = 0; u < 16; u++)
        totals[m][d][u] = __builtin_fmaf(factor(task, s, m, d), static_cast<float>(dot[m][d][u]), totals[m][d][u]);
}

}  // namespace

const Int8VectorKernel int8_vector_linear_serial = {round_for_vectors, int8_vector_run};

}  // namespace fewbit
