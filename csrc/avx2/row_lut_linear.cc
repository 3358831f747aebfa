// SPDX-License-Identifier: Apache-2.0
#include "avx2/half_rows.h"
#include "avx2/level_bytes.h"

namespace fewbit {
namespace {

// Chunk A of codes of 4 bits and the one behind it, or A twice: vectors 0 and 1 of a field are columns 0-7 and 8-15 of A.
FEWBIT_INLINE void two_chunks(const LevelBytes& levels, const uint8_t* codes, bool both, F (&field)[2][4]) {
  const U found =
      both ? load_lanes(codes) : _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const U lanes = _mm256_permutevar8x32_epi32(found, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  levels(mask(lanes, 0x0f0f0f0fu), field[0]);
  levels(mask(shift_right(lanes, 4), 0x0f0f0f0fu), field[1]);
}

// As rows_beside<4, 1, 1>, sum by sum: one lookup by bytes and two merges take half the time of two by floats and a choice.
void nibble_row(const RowTask& task, int64_t row) {
  const RowLevels<4> table(task, row);
  const LevelBytes levels(table.level);
  const uint8_t* codes = task.codes + row * task.chunks * 16;
  const float *scale = task.scale + row * task.blocks, *x = task.panel;
  F total = broadcast(0.0f);
  for (int64_t b = 0, chunk = 0; b < task.blocks; b++) {
    F sum[2] = {broadcast(0.0f), broadcast(0.0f)}, field[2][4];
    const auto add_chunk = [&](int first) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++)
          sum[(n + i) % 2] = fma(field[n][first + i], load(x + n * 16 + i * 8), sum[(n + i) % 2]);
      x += 32;
    };
    const int64_t end = b + 1 < task.blocks ? (b + 1) * task.block_chunks : task.chunks;
    for (; chunk + 2 <= end; chunk += 2) {
      two_chunks(levels, codes + chunk * 16, true, field);
      add_chunk(0);
      add_chunk(2);
    }
    if (chunk < end) {
      two_chunks(levels, codes + chunk++ * 16, false, field);
      add_chunk(0);
    }
    total = fma(broadcast(scale[b]), add(sum[0], sum[1]), total);
  }
  write_float(task.y, task.y_dtype, row, total_of(total) + (task.bias ? task.bias[row] : 0.0f));
}

void run(const RowTask& task, int64_t begin, int64_t end) {
  if (task.table_half && task.blocks == 1) switch (task.bits) {
      case 1: return half_rows_of<1>(task, begin, end);
      case 2: return half_rows_of<2>(task, begin, end);
      case 3: return half_rows_of<3>(task, begin, end);
      case 4: return half_rows_of<4>(task, begin, end);
    }
  if (task.bits != 4 || task.tokens != 1 || task.together != 1) return row_lut_run(task, begin, end);
  for (; begin < end; begin++) nibble_row(task, begin);
}

}  // namespace

const RowKernel row_lut_linear_avx2 = {run, row_lut_decode};

}  // namespace fewbit
