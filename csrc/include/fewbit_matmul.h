/* SPDX-License-Identifier: Apache-2.0
 *
 * Products of two activations, as attention has them. Status codes and instruction sets are those of fewbit.h. */
#ifndef FEWBIT_MATMUL_H
#define FEWBIT_MATMUL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Matrices of activations, `stride_outer` and `stride_middle` elements apart, float32, and the grid that they are rounded to:
 * x = scale * (code - zero) with codes 0 .. 2^bits - 1. */
typedef struct {
  const void* data;
  int64_t stride_outer, stride_middle, stride_row, stride_column; /* elements; 0: the same again */
  float scale;
  int32_t zero, bits; /* 1 to 8 */
} fewbit_operand;

/* y = a b for outer * middle pairs of matrices, a (rows, inner) and b (inner, columns), both rounded to their grids:
 *
 *   code = clamp(round_half_even(x / scale + zero), 0, 2^bits - 1)
 *   y = float32(scale_a * scale_b) * float32(sum (code_a - zero_a) (code_b - zero_b))
 *
 * Sums are exact integers in int32: inner is at most 2^15. NaN or infinity in a row of a or a column of b makes NaN of all
 * that it takes part in. y: (outer, middle, rows, columns), contiguous. The result is the same on every ISA and at any number
 * of threads. isa: as in fewbit_linear. */
int fewbit_int8_matmul(const fewbit_operand* a, const fewbit_operand* b, int64_t outer, int64_t middle, int64_t rows,
                       int64_t inner, int64_t columns, float* y, int32_t isa, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif /* FEWBIT_MATMUL_H */
