// SPDX-License-Identifier: Apache-2.0
// What the driver and the per-ISA kernels of products of two activations agree on. Plain data only, as in kernel.h.
#pragma once

#include <stdint.h>

#include "fewbit_matmul.h"

namespace fewbit {

// Rows [0, rows) of one matrix a times one matrix b.
struct MatmulTask {
  fewbit_operand a, b;  // where row 0, column 0 lies
  int64_t rows, inner, columns;
  int64_t pairs, strips;  // of neighbours along inner; runs of kStripColumns columns
  int16_t* left;          // scratch (kMatmulRows, pairs, 2)
  int16_t* right;         // scratch (strips, pairs, kStripColumns, 2)
  int16_t* lines;         // scratch of lines of b: kGathered, or two
  float* factor;          // scratch (strips, kStripColumns): of a column, 1, or NaN
  float* gathered;        // scratch of as many numbers, or kMatmulRows lines of a
  float* y;               // (rows, columns)
};

enum : int64_t { kMatmulRows = 4, kStripColumns = 32, kGathered = 2048 };

// One instruction set.
struct MatmulKernel {
  void (*pack)(const MatmulTask& task);  // b, for all rows
  void (*run)(const MatmulTask& task);
};

extern const MatmulKernel int8_matmul_serial, int8_matmul_avx2, int8_matmul_avx512, int8_matmul_neon;

}  // namespace fewbit
