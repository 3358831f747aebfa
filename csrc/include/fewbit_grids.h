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

/* codes (count): how many of the ascending bounds (at most 255) are below each of values (count); all, for NaN. isa: as above. */
int fewbit_table_codes(const float* values, int64_t count, const float* bounds, int32_t bound_count, uint8_t* codes, int32_t isa);

/* begins (tables, count), a result: where each of `count` clusters of ascending numbers begins, so that the sum over clusters of
 * S2 - S1^2 / S0 is least, the first of equals. s0, s1, s2 (tables, size): weights, and these times the numbers and their
 * squares, added up to each number, of 0 numbers at first: size - 1 numbers a table, more than count. S0 counts as 2^-48 at
 * least. best (size) and scratch ((count + 2) * size) are room to work in. */
typedef struct {
  const double *s0, *s1, *s2;
  int64_t tables, size, count;
  int64_t *begins, *best;
  double* scratch;
} fewbit_clusters_call;
int fewbit_clusters(const fewbit_clusters_call* call);

#ifdef __cplusplus
}
#endif

#endif /* FEWBIT_GRIDS_H */
