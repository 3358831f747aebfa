/* SPDX-License-Identifier: Apache-2.0
 *
 * Rounding, searches and sweeps of the solvers, on the caller's thread. Status codes and instruction sets are those of fewbit.h. */
#ifndef FEWBIT_GRIDS_H
#define FEWBIT_GRIDS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Ranges of even grids: w = scale * (code - zero) for codes 0 .. levels - 1, a scale (a float16 of at least 2^-24) and a zero
 * each block of `block` columns. Each block of weight (rows, columns) gets the grid, of those below, on which the sum of
 * worth * (w - nearest)^2 over its columns is least, the first of equals; sums add the upper half of a block, filled up with
 * zeros, to the lower half until one is left, so that the result is the same on every ISA. Finite weights only.
 *
 * ends != 0: the grid lies between the ends of the block and 0, times each of `count` ratios and of 1 at first: scale =
 * float16((high - low) / (levels - 1)), zero = round(-low / scale), kept among the codes. Else the zero is levels / 2, and
 * the largest weight of the block, times each ratio, lies on code 0, to which the sign of the scale turns it; tried first
 * is scale = float16(2 max|w| / (levels - 1)).
 *
 * worth (columns); scale and zero (rows, blocks) are results. isa: FEWBIT_AVX2 or FEWBIT_SERIAL, which always works. */
typedef struct {
  const float *weight, *worth, *ratios;
  int64_t rows, columns, block, count;
  int32_t levels, ends;
  float *scale, *zero;
} fewbit_grid_search_call;
int fewbit_grid_search(const fewbit_grid_search_call* call, int32_t isa);

/* codes (rows, columns), a result: of each weight the one that is nearest on the grid of its block; and, where `given` is 0, the
 * grids as well, as they are stored: the first of those above, which no worth decides. scale (rows, blocks): float16, finite,
 * of which 0 divides as 1 does; zero (rows, blocks), or null where it is levels / 2. sums, a result: what fewbit_squares says
 * of them, to the bit where offset = -scale * zero. isa: as above. */
typedef struct {
  const float* weight;
  int64_t rows, columns, block;
  int32_t levels, given;
  uint16_t* scale;
  uint8_t *zero, *codes;
  double* sums;
} fewbit_grid_round_call;
int fewbit_grid_round(const fewbit_grid_round_call* call, int32_t isa);

/* sums[0]: of the squares of value - weight, sums[1]: of the squares of weight (rows, columns), where
 * value = level * scale + offset, the level being table[code], or the code itself where table is null. scale and offset, which
 * may be null: (rows, blocks); codes (rows, columns), all of them below the length of the table. Rows are added up in float32,
 * their sums in float64. isa: as above, which may change the last bits. */
typedef struct {
  const float *weight, *scale, *offset, *table;
  const uint8_t* codes;
  int64_t rows, columns, block;
  double* sums;
} fewbit_squares_call;
int fewbit_squares(const fewbit_squares_call* call, int32_t isa);

/* Codes (rows, columns), a byte each, as fields of `bits` bits, 1 to 7, least significant first, a row to whole bytes: packed
 * (rows, ceil(columns * bits / 8)); and back. Codes are below 2^bits. */
int fewbit_pack_fields(const uint8_t* codes, int64_t rows, int64_t columns, int32_t bits, uint8_t* packed);
int fewbit_unpack_fields(const uint8_t* packed, int64_t rows, int64_t columns, int32_t bits, uint8_t* codes);

/* Columns rounded to such grids one after another, each error passed on to those that follow: for k = 0 .. columns - 1
 *   x = current_k + upper_0k lost_0 + ... + upper_{k-1}k lost_{k-1},   lost_k = before_k - nearest(x)
 * all of it vectors of `rows`, products and sums rounded one by one from the left, the same on every ISA.
 *
 * current, before and lost, a result: (columns, rows), at most FEWBIT_SWEPT columns. upper (columns, columns), columns
 * `upper_stride` apart. order (columns): which row of codes (.., rows), a result, step k writes, and which grid it takes:
 * scale and zero are (blocks, rows), a block every `block` rows of codes. isa: as above. */
#define FEWBIT_SWEPT 128
typedef struct {
  const float *current, *before, *upper, *scale, *zero;
  const int64_t* order;
  int64_t rows, columns, upper_stride, block;
  int32_t levels;
  float* lost;
  uint8_t* codes;
} fewbit_grid_sweep_call;
int fewbit_grid_sweep(const fewbit_grid_sweep_call* call, int32_t isa);

/* Of the scales tried for each block, the one that serves a table best: w = scale * table[code], a code being the number of
 * bounds that are below w / scale. Each block of weight (rows, blocks, block) gets the first of those `count` scales on which
 * the sum of worth * (w - scale * table[code])^2 is least; it is added up as that of grids. The result is the same on every ISA.
 *
 * worth (blocks, block); scales (count, rows, blocks), none of them zero; table (levels), bounds (levels - 1), ascending;
 * chosen (rows, blocks), a result, counts scales from 0. isa: as above. */
typedef struct {
  const float *weight, *worth, *scales, *table, *bounds;
  int64_t rows, blocks, block, count;
  int32_t levels;
  int64_t* chosen;
} fewbit_table_search_call;
int fewbit_table_search(const fewbit_table_search_call* call, int32_t isa);

/* codes (tables, count): how many of the ascending bounds (tables, at most 255) of its table are below each of values
 * (tables, count); all, for NaN. isa: as above. */
int fewbit_table_codes(const float* values, int64_t tables, int64_t count, const float* bounds, int32_t bound_count, uint8_t* codes,
                       int32_t isa);

/* k-means of numbers: centers (tables, count), a result, ascending, of least sum of weight * (value - nearest center)^2 in
 * each table. values, weights (tables, size); weights, not negative, may be null: all count alike then, and where all of a
 * table are zero; otherwise what weighs nothing does not count. `cells`: numbers that one float16 stands for count as one,
 * at their mean. Where no more than `count` numbers differ, the last is repeated. */
typedef struct {
  const float *values, *weights;
  int64_t tables, size, count;
  int32_t cells;
  double* centers;
} fewbit_centers_call;
int fewbit_centers(const fewbit_centers_call* call);

/* Of each column of x (rows, columns): the sums of x, x^2 and |x|, and the largest |x|, NaN where one is; sums, a result, is
 * (4, columns), zeros for no rows. FEWBIT_STRETCH rows are added up one by one in float32, and then their sums, the same on
 * every ISA. isa: as above. */
#define FEWBIT_STRETCH 64
int fewbit_column_sums(const float* x, int64_t rows, int64_t columns, float* sums, int32_t isa);

#ifdef __cplusplus
}
#endif

#endif /* FEWBIT_GRIDS_H */
