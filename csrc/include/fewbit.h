/* SPDX-License-Identifier: Apache-2.0
 *
 * fewbit's native core: a C ABI on raw pointers. It sees neither Python nor torch, and allocates only its scratch.
 *
 * Layout tile16
 * -------------
 * Rows in tiles of 16, columns in chunks of 32. A chunk of 16 rows x 32 columns of b-bit codes takes exactly b vectors
 * of 64 bytes, so the layout wastes nothing but the padding of ragged edges (code 0). A vector is 16 little-endian
 * 32-bit lanes; lane r belongs to row r of the tile. A code is split into parts of power-of-two width, lowest bits
 * first and widest part first:
 *
 *   b      1    2    3      4    5      6      7        8
 *   parts  1    2    2+1    4    4+1    4+2    4+2+1    8
 *
 * A part of width w takes w vectors of 8/w fields a byte. Four neighbouring columns stand at the same place of the four
 * bytes of a lane, so that a shift and a mask yield four codes as bytes, for products of bytes: with g = k/4, column k
 * of the chunk lies in vector g*w/8 of the part, in byte k%4 of the lane, at its bits [g*w % 8, g*w % 8 + w). Chunks of
 * a tile follow one another, then the next tile.
 * Bytes: ceil(rows/16) * ceil(columns/32) * b * 64.
 *
 * Layout halves16
 * ---------------
 * The same tiles, chunks and lanes, of 3 bits, for instruction sets that shift wider words than bytes: a code stands in the
 * low bits of each half of a byte, whose highest bits hold two more codes. Of group g = k/4 < 6, column k lies in vector
 * g/2, in byte k%4 of the lane, at its bits [g%2 * 4, g%2 * 4 + 3); bit v of a code of group 6 + h in vector v, at bit
 * 4h + 3 of byte k%4.
 *
 * Layout bytes16
 * --------------
 * The same tiles and chunks, of 1 bit, for lookups of four columns in 16 rows at once: bytes j of all lanes of a vector lie
 * together, those of rows 0-3, 8-11, 4-7 and 12-15 in this order, for j = 0 .. 3.
 *
 * A matrix is w[row][column] = scale * (table[code] - zero) + offset, table[code] = code where there is no table.
 */
#ifndef FEWBIT_H
#define FEWBIT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bits of fewbit_caps(): what this machine can run of what this build contains. */
enum {
  FEWBIT_SERIAL = 1,
  FEWBIT_AVX2 = 2,       /* and FMA, F16C, BMI2 */
  FEWBIT_AVX512 = 4,     /* F, BW, VL, DQ */
  FEWBIT_AVX512VNNI = 8, /* the above and VNNI */
  FEWBIT_NEON = 16,
  FEWBIT_NEONDOT = 32,      /* NEON with the dot product of ARMv8.2 */
  FEWBIT_AVX512VPOPCNT = 64, /* that of FEWBIT_AVX512, and VPOPCNTDQ */
  FEWBIT_AVX512VBMI = 128,   /* that of FEWBIT_AVX512VNNI, and VBMI */
  FEWBIT_AVX512BF16 = 256,   /* that of FEWBIT_AVX512, and BF16, where it is faster than float32: on AMD */
  FEWBIT_AVXVNNI = 512,      /* that of FEWBIT_AVX2, and AVX-VNNI */
  FEWBIT_NEONI8MM = 1024     /* that of FEWBIT_NEONDOT, and the matrix product of bytes of ARMv8.6 */
};

/* Families, types of activations and results, status codes. */
enum { FEWBIT_AFFINE = 0, FEWBIT_LUT = 1 };
enum { FEWBIT_FLOAT32 = 0, FEWBIT_BFLOAT16 = 1, FEWBIT_FLOAT16 = 2 };
enum { FEWBIT_SIGNS = -1, FEWBIT_BFLOAT16S = -2, FEWBIT_INT24 = -3 }; /* an x_block: activations become signs, are
                                                                        * bfloat16, or become integers of 24 bits */
enum { FEWBIT_OK = 0, FEWBIT_BAD_ARGUMENT = 1, FEWBIT_NO_KERNEL = 2, FEWBIT_NO_MEMORY = 3 };

/* One matrix in tile16. Pointers need no alignment beyond that of their element type. */
typedef struct {
  int64_t rows, columns;
  int64_t block;       /* columns that share a scale; `columns` when the whole row does */
  int32_t bits;        /* 1 to 8 */
  int32_t family;      /* FEWBIT_AFFINE or FEWBIT_LUT */
  int32_t scale_half;  /* 1: scale is IEEE float16, 0: float32 */
  int32_t offset_half; /* likewise for offset */
  float zero;          /* the same for every block; 0 for FEWBIT_LUT */
  const uint8_t* codes;
  const void* scale;  /* (tiles, blocks, 16) */
  const void* offset; /* (tiles, blocks, 16), or NULL when 0 everywhere */
  const float* table; /* (2^bits) for FEWBIT_LUT, else NULL */
  int32_t arranged;   /* 1: codes of 3 bits lie in halves16, of 1 bit (FEWBIT_AFFINE) in bytes16; times int8 on FEWBIT_AVX2
                         only. 0: in tile16 */
} fewbit_matrix;

int32_t fewbit_caps(void);

/* Bytes of codes in tile16, or -1 when the arguments make no sense. */
int64_t fewbit_tile16_bytes(int64_t rows, int64_t columns, int32_t bits);

/* codes: (rows, columns) one byte each, rows `stride` bytes apart; packed: fewbit_tile16_bytes(...). Bits of a code
 * above `bits` are ignored. fewbit_tile16_unpack is the inverse. */
int fewbit_tile16_pack(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, int32_t bits,
                       uint8_t* packed);
int fewbit_tile16_unpack(const uint8_t* packed, int64_t rows, int64_t columns, int32_t bits, uint8_t* codes,
                         int64_t stride);

/* Moves codes of 3 bits from tile16 to halves16, of 1 bit to bytes16, or back, in the same memory: (rows, columns) of them. */
int fewbit_arrange(int64_t rows, int64_t columns, int32_t bits, int32_t back, uint8_t* packed);

/* Threads that every later call uses instead of its `threads` argument; 0 gives that back to the caller. */
void fewbit_set_threads(int32_t threads);

/* y[token][row] = sum over columns of x[token][column] * w[row][column] + bias[row].
 *
 * x: (tokens, columns) float32, tokens `x_stride` floats apart; y: (tokens, rows) float32, `y_stride` apart; bias:
 * (rows) or NULL. isa: one bit of fewbit_caps(). threads: at most this many, the caller included.
 * Accumulates in float32, column by column within a block, then block by block. The result depends neither on `threads`
 * nor on `tokens`: a token gives the same bits in any company. Error: at most about
 * (block + blocks + 6) * 2^-24 times the sum of (|scale| (|table[code]| + |zero|) + |offset|) |x|.
 */
int fewbit_linear(const fewbit_matrix* matrix, const float* x, int64_t x_stride, int64_t tokens, const float* bias,
                  float* y, int64_t y_stride, int32_t isa, int32_t threads);

/* The weights themselves, transposed: out[column * stride + row - 16 * tile_begin] for the rows of tiles
 * [tile_begin, tile_end), 16 * (tile_end - tile_begin) entries a column, padding included. Computed in float32 as
 * scale * (table[code] - zero) + offset, each operation rounded. */
int fewbit_decode(const fewbit_matrix* matrix, int64_t tile_begin, int64_t tile_end, float* out, int64_t stride,
                  int32_t isa, int32_t threads);

/* As fewbit_linear, for FEWBIT_AFFINE and for FEWBIT_LUT of at most 6 bits, with integer products: x is rounded to int8
 * first, `x_block` columns of a token sharing a scale (x_block >= columns: all of them), exactly as the format
 * int8/g{x_block}/sym does it:
 *
 *   s = float16(clamp(2 max|x| / 255, 2^-24, 65504)),  q = clamp(round_half_even(x / s + 128), 0, 255) - 128
 *
 * and y is that of s * q. matrix->block and x_block must be multiples of 32, or whole rows. Products are summed in int32
 * over at most 256 columns, where 255 * 128 * 256 < 2^24 excludes overflow and keeps the sum an exact float32, or over a
 * whole row where both are whole rows and (2^bits - 1) * 128 * columns < 2^24 (columns <= 131071 at 1 bit, 43690 at 2,
 * 8738 at 4, 1032 at 7); scales are applied to these sums. A table is multiplied as step * level, with integer levels:
 * exactly, where all entries are multiples of a step of which the largest is at most 32767 (one byte a level up to 15, as
 * for E2M1, and but for AVX2 up to 127, else 16 bits); otherwise with entries rounded to 16 bits, wrong by at most 2^-15
 * of the largest entry (and 2^-149). 32767 * 128 * 256 < 2^30 excludes overflow, as it would up to 512 columns; that sum is
 * rounded to float32 once. Entries must be finite.
 * The result is the same on every ISA, at any number of threads and tokens. Error against the rounded x and table: at
 * most about (2 segments + 6) * 2^-24 times the magnitude as above, with ceil(columns / 32) or fewer segments. A block
 * that holds NaN or infinity makes its token's results NaN. */
int fewbit_linear_int8(const fewbit_matrix* matrix, int64_t x_block, const float* x, int64_t x_stride, int64_t tokens,
                       const float* bias, float* y, int64_t y_stride, int32_t isa, int32_t threads);

/* Signs times signs (XNOR-Net, Rastegari et al. 2016): x is rounded first, all columns of a token sharing a scale,
 * exactly as the format sign/channel does it, with the mean in float64 and the quotient in float32,
 *
 *   s = float16(clamp(mean |x|, 2^-24, 65504)),  q = +1 where x / s > 0, else -1
 *
 * and y is that of s * q: s * scale / 2 * (columns - 2 * signs that differ). The matrix holds signs: bits 1,
 * FEWBIT_AFFINE, zero 0.5, no offset, block = columns, so that a weight is -scale / 2 or +scale / 2. columns must be at
 * most 2^24: up to there the sum of signs is an exact float32 (an int32 holds it up to 2^31 - 1). The result is the
 * same on every ISA, at any number of threads and tokens. Error against the rounded x: at most about 3 * 2^-24 times
 * |scale / 2 * s * sum| + |bias|. A token that holds NaN gives NaN; infinity counts as its sign, at the largest s. */
int fewbit_linear_xnor(const fewbit_matrix* matrix, const float* x, int64_t x_stride, int64_t tokens, const float* bias,
                       float* y, int64_t y_stride, int32_t isa, int32_t threads);

/* Activations: column c of token t is element t * stride + c * step of data. dtype: FEWBIT_FLOAT32, ...
 *
 * scale, zero: only of int8 products of one scale a token. A scale of 0 is found for each block as by
 * fewbit_linear_int8; any other, positive and finite, is that of all tokens (static quantization), and
 *
 *   q = clamp(round_half_even(x / scale + zero), 0, 255) - 128,   zero 0 .. 255
 *
 * y is that of scale * q; what stands for x is scale * (q + 128 - zero), so that a zero other than 128 leaves the caller
 * to add scale * (128 - zero) times the sum of each row of the weight, once, to the bias. */
typedef struct {
  const void* data;
  int64_t tokens, stride, step;
  int32_t dtype;
  float scale;
  int32_t zero;
} fewbit_input;

/* What one matrix makes of them: y (tokens, rows), tokens `y_stride` elements apart, plus bias (rows) or NULL. */
typedef struct {
  const fewbit_matrix* matrix;
  const float* bias;
  void* y;
  int64_t y_stride;
} fewbit_output;

/* fewbit_linear (x_block 0), fewbit_linear_xnor (FEWBIT_SIGNS) or fewbit_linear_int8 of several matrices of as many
 * columns, bit for bit: x is laid out or rounded once for all matrices of a run that agree in what that depends on
 * (family, bits, block and table for float products; the columns a segment for integer ones; nothing for signs), and
 * their row tiles are handed out together.
 *
 * x is widened to float32 as it is read, exactly; results are rounded to y_dtype as they are written, to nearest, ties
 * to even, past the largest float16 to infinity: as if x and y were converted before and after, without the copies.
 *
 * FEWBIT_BFLOAT16S is for x of FEWBIT_BFLOAT16 and FEWBIT_AFFINE, on FEWBIT_AVX512BF16: codes less the zero (where these
 * have 8 significant bits, else codes) times activations are exact products, of which two columns at a time are added in
 * float32 within at most 256 columns, then scaled. Blocks must be multiples of 32, or whole rows. The result depends
 * neither on the threads nor on the tokens. Error: as of fewbit_linear. Numbers below 2^-126 count as 0. For many tokens.
 *
 * FEWBIT_INT24 is for FEWBIT_AFFINE, on FEWBIT_AVX2, what multiplies four bytes at once, and FEWBIT_SERIAL: x is rounded to
 * whole multiples of a power of two, one a token,
 *
 *   s = 2^(e - 22), at least 2^-126, where max|x| < 2^(e + 1) (1 - 2^-7);  q = round(x / s), halves away from 0
 *
 * so that |q| < 2^23, and x differs from s * q by at most s / 2 <= 2^-22 max|x| (2^-23 but where max|x| lies within 1 % of a
 * power of two), and not at all where no activation has bits below s: bfloat16 down to 2^-14 max|x|. The three signed
 * bytes of q are multiplied as fewbit_linear_int8 does it with int8, each with the scale of its place. Blocks must be
 * multiples of 32, or whole rows. The result is the same on every ISA, at any number of threads and tokens. Error against
 * s * q: as that of fewbit_linear_int8. NaN or infinity makes its token's results NaN. Of FEWBIT_LUT: core/int24_lut.h. */
int fewbit_linear_many(const fewbit_output* outputs, int32_t count, const fewbit_input* x, int64_t x_block,
                       int32_t y_dtype, int32_t isa, int32_t threads);

/* Few entries of a matrix of many, in the layout slice8: SELL-C-sigma (Kreutzer et al. 2014, arXiv:1307.6209) with
 * slices of 8 rows out of windows of 256. The rows of a window are sorted by how many entries they have, most first,
 * and cut into slices; a slice takes as many steps as its longest row has entries, and step k holds the k-th entry of
 * each of its rows. Where a row has fewer, the column is `columns` and the value 0. Lanes that have no row (the last
 * slice) are such rows.
 * Bytes: 8 * (steps * (index + value bytes) + slices) + 8 * (slices + 1), slices = ceil(rows / 8). */
typedef struct {
  int64_t rows, columns;
  int32_t index_bytes;  /* 2: uint16, where columns < 65536; or 4: int32 */
  int32_t value_half;   /* 1: value is IEEE float16, 0: float32 */
  const int64_t* start; /* (slices + 1): a slice's first step, and the number of all steps */
  const uint8_t* order; /* (slices, 8): row of a lane within its window; a lane whose row is no row of the matrix counts
                           for nothing */
  const void* index;    /* (steps, 8), at most `columns` */
  const void* value;    /* (steps, 8) */
} fewbit_sparse;

/* y[token][row] += sum over the entries of the row of value * x[token][column]: y (tokens, rows) float32, `y_stride`
 * apart, holds what to add to, so that outliers join a dense product without a buffer of their own. x is widened to
 * float32 as by fewbit_linear_many. isa: as in fewbit_linear; AVX-512 brings nothing here and runs what AVX2 runs.
 *
 * A row's entries are added up in the order of the layout, product and sum each rounded to float32, then once onto y.
 * The result is the same on every ISA, at any number of threads and tokens. Error: at most about (entries of the row +
 * 2) * 2^-24 times the sum of |value x|, and 2^-24 |y|. Indices are not checked here. */
int fewbit_sparse_add(const fewbit_sparse* matrix, const fewbit_input* x, float* y, int64_t y_stride, int32_t isa,
                      int32_t threads);

/* A matrix of vectors: w[dim r + d][column] = book[column / block][i][d] + residual[column / block][j][d], where code
 * (r, column) is i + 2^bits j; without a residual i alone (VPTQ, Liu et al. 2024, arXiv:2409.17066).
 *
 * Layout column8: eight codes, of neighbouring r, lie together as dense fields: their i in `bits` bytes, index n at bits
 * [n bits, n bits + bits) counted from the lowest bit of the first byte, then their j in `residual_bits` bytes. Columns
 * follow one another, then the next eight r. Bytes: ceil(ceil(rows / dim) / 8) * columns * (bits + residual_bits).
 * Every index is below 2^bits, the entries of a book, whatever the bytes are. */
typedef struct {
  int64_t rows, columns;
  int64_t block;                /* columns that share books; `columns` when all do */
  int32_t dim;                  /* rows that a code spans: 2, 4, 6, 8, 12 or 16 */
  int32_t bits, residual_bits;  /* 4 to 16; residual_bits 0: there is no residual */
  int32_t half;                 /* 1: entries are IEEE float16, 0: float32 */
  const uint8_t* codes;
  const void* book;             /* (blocks, 2^bits, width) with width = dim rounded up to 4, 8 or 16 by zeros */
  const void* residual;         /* (blocks, 2^residual_bits, width), or NULL */
} fewbit_vectors;

/* y[token][row] = sum over columns of x[token][column] * w[row][column] + bias[row], with w as above in float32 and
 * each product added in float32, column after column: the result depends on neither `threads` nor `tokens`. Activations
 * are not rounded. Error: at most about (columns + 2) * 2^-24 times the sum of |w| |x| and |bias|.
 * y: (tokens, rows) of y_dtype, tokens `y_stride` elements apart; all else as in fewbit_linear_many. */
int fewbit_vector_linear(const fewbit_vectors* matrix, const fewbit_input* x, const float* bias, void* y,
                         int64_t y_stride, int32_t y_dtype, int32_t isa, int32_t threads);

/* The weights transposed: out[column * stride + row - 8 dim tile_begin] for the rows of tiles [tile_begin, tile_end) of
 * 8 dim rows, padding included. */
int fewbit_vector_decode(const fewbit_vectors* matrix, int64_t tile_begin, int64_t tile_end, float* out, int64_t stride,
                         int32_t isa, int32_t threads);

/* As fewbit_vectors, with entries rounded to bytes: w[dim r + d][column] = offset[d] + step[d] * (book[d][i] +
 * residual[d][j]), with the books, steps and offsets of block column / block; a sum of two bytes must stay below 256.
 *
 * Layout vector16: the codes of a matrix of (ceil(rows / dim), columns) in tiles of 16 and chunks of 32 columns. A chunk is
 * that of the indices i in tile16, in `bits` vectors, then that of the indices j, in `residual_bits`. Of 6 bits it is
 * another: vector g holds columns 4g .. 4g+3 in the low 6 bits of its bytes, and the two above, of vectors 3h, 3h+1 and
 * 3h+2, are bits 0-1, 2-3 and 4-5 of columns 24 + 4h .. 27 + 4h. Bytes:
 * ceil(ceil(rows / dim) / 16) * ceil(columns / 32) * (bits + residual_bits) * 64.
 *
 * Where bits or residual_bits is above 8, in as many bytes, each code of a tile by itself: chunks of 32 columns, each the
 * indices i as dense fields in 4 bits bytes, index n at bits [n bits, n bits + bits) counted from the lowest bit of the
 * first byte, then the indices j in 4 residual_bits bytes. */
typedef struct {
  int64_t rows, columns;
  int64_t block;                /* columns that share books, a multiple of 32; or `columns` */
  int32_t dim;                  /* rows that a code spans: 2, 4, 6, 8, 12 or 16 */
  int32_t bits, residual_bits;  /* 4 to 8, or 8 to 16 where one is above 8; residual_bits 0: there is no residual */
  const uint8_t* codes;
  const uint8_t* book;          /* (blocks, 1 or 2 books, dim, entries): entries 64 where all bits are at most 6, else
                                   256; entry i is that of index i % 2^bits. Where one is above 8 bits: (blocks, 2^bits +
                                   2^residual_bits or 2^bits, 8 or 16), dim bytes of an entry and zeros */
  const float *step, *offset;   /* (blocks, dim) */
} fewbit_byte_vectors;

/* y[token][row] = sum over columns of x[token][column] * w[row][column] + bias[row], x rounded to int8 as by
 * fewbit_linear_int8. Sums of bytes times activations are exact integers: over at most 256 columns, as 255 * 128 * 256 <
 * 2^24, or, of indices above 8 bits where block and x_block are whole rows, over all of at most 2^16 columns, as 255 * 128 *
 * 2^16 < 2^31, rounded to float32 once; offsets are multiplied by the sums of the activations, once a token. isa:
 * FEWBIT_SERIAL, FEWBIT_AVX2 or FEWBIT_AVX512VBMI. The result is the same on all, at any number of threads and tokens. Error
 * against the rounded x and w: at most about (2 segments + 8) * 2^-24 times the sum of (2 |offset| + 255 |step|) |x| and
 * |bias|, with segments as there. */
int fewbit_vector_linear_int8(const fewbit_byte_vectors* matrix, int64_t x_block, const fewbit_input* x,
                              const float* bias, void* y, int64_t y_stride, int32_t y_dtype, int32_t isa,
                              int32_t threads);

/* Rows with tables of their own: w[row][column] = scale[row][column / block] * table[row / table_rows][code].
 *
 * Layout row16: each row by itself, its columns in chunks of 128 / bits, or 384 / bits where that is 3 or 6. A chunk is 16
 * lanes of one byte, or of three; column k of the chunk lies in lane k % 16, at its bits [k / 16 * bits, k / 16 * bits +
 * bits). Four chunks lie together, and the last one to three of a row: the bytes that hold bits 0 to 7 of all their lanes,
 * then those with 8 to 15, then 16 to 23. The last chunk is padded with code 0.
 * Bytes: rows * ceil(columns / chunk) * 16, or 48.
 *
 * Layout rowhalves16: the same of 3 bits, but for the bits of a lane. Code n = k / 16 < 6 is bits [n%2 * 4, n%2 * 4 + 3) of byte
 * n/2; bit v of code 6 + h is bit 4h + 3 of byte v. */
typedef struct {
  int64_t rows, columns;
  int64_t block;       /* columns that share a scale: whole chunks, or at least `columns` */
  int64_t table_rows;  /* rows that share a table */
  int32_t bits;        /* 1, 2, 3, 4, 6 or 8 */
  int32_t table_half;  /* 1: levels are IEEE float16, 0: float32 */
  const uint8_t* codes;
  const void* table;   /* (ceil(rows / table_rows), 2^bits) */
  const float* scale;  /* (rows, ceil(columns / block)) */
  int32_t halves;      /* 1: codes lie in rowhalves16, to be decoded only. 0: in row16 */
} fewbit_row_tables;

/* y[token][row] = sum over columns of x[token][column] * w[row][column] + bias[row]: products of levels and activations are
 * added in float32 lane by lane, in two chains; sums of a block are scaled and added up. The result depends on neither
 * `threads` nor `tokens`. Error: at most about (block / (2 lanes) + blocks + lanes + 6) * 2^-24 times the sum of
 * |scale * level| |x| and |bias|, lanes being at least 4. All else as in fewbit_linear_many. */
int fewbit_row_linear(const fewbit_row_tables* matrix, const fewbit_input* x, const float* bias, void* y,
                      int64_t y_stride, int32_t y_dtype, int32_t isa, int32_t threads);

/* As fewbit_row_tables, with levels of 8 bits: w[row][column] = factor[row] * (level[row / table_rows][code] - 128). */
typedef struct {
  int64_t rows, columns;
  int64_t table_rows;    /* rows that share a table */
  int32_t bits;          /* 1 to 4 */
  const uint8_t* codes;  /* in row16 */
  const uint8_t* levels; /* (tables, 16), 1 to 255; entry i is that of code i % 2^bits */
  const float* factor;   /* (rows) */
  int32_t halves;        /* 1: codes, of 3 bits, lie in rowhalves16; on FEWBIT_AVX2 only */
} fewbit_row_levels;

/* Moves codes of 3 bits from row16 to rowhalves16, or back, in the same memory: (rows, columns) of them. */
int fewbit_rowhalves16(int64_t rows, int64_t columns, int32_t back, uint8_t* packed);

/* y = x W^T + bias with x rounded to int8, one scale a token, as by fewbit_linear_int8. Products of bytes and activations
 * are summed in int32 over the whole row: at most 2^16 columns, where 255 * 128 * 2^16 < 2^31 excludes overflow. isa:
 * FEWBIT_SERIAL, FEWBIT_AVX2 or one that multiplies four bytes at once. The result is the same on every ISA, at any number
 * of threads and tokens. Error against the rounded x and these levels: at most about 6 * 2^-24 times the sum of 2^8 |factor| |x| and
 * |bias|. NaN or infinity makes its token's results NaN. */
int fewbit_row_linear_int8(const fewbit_row_levels* matrix, const fewbit_input* x, const float* bias, void* y,
                           int64_t y_stride, int32_t y_dtype, int32_t isa, int32_t threads);

/* The weights of rows [row_begin, row_end), scale * level: out[(row - row_begin) * stride + column]. On an instruction set
 * of integers, that of floats beside it decodes. */
int fewbit_row_decode(const fewbit_row_tables* matrix, int64_t row_begin, int64_t row_end, float* out, int64_t stride,
                      int32_t isa, int32_t threads);

/* Which elements of x (images, channels, height, width) the windows of a convolution see. `stride_*` are elements of x
 * between neighbours on an axis, so that any memory order works; `step_*` are positions between windows, which others
 * call the stride of a convolution. Zeros lie around an image, as far as windows reach. */
typedef struct {
  int64_t channels, height, width;
  int64_t stride_image, stride_channel, stride_row, stride_column;
  int64_t kernel_h, kernel_w, step_h, step_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t out_h, out_w;  /* windows of an image, down and across */
  int32_t element_bytes; /* 2 or 4 */
} fewbit_windows;

/* Windows [begin, end), counted across, then down, then by image, as rows for fewbit_linear:
 * out: (end - begin, channels, kernel_h, kernel_w) elements, contiguous. A copy: bits are kept. */
int fewbit_unfold(const fewbit_windows* windows, const void* x, int64_t begin, int64_t end, void* out, int32_t threads);

/* Convolution in groups of activations rounded to int8, each window of each group by a scale of its own, exactly as
 * fewbit_linear_int8 rounds a token of one block: x (images, channels, height, width) of `dtype`, element_bytes each ->
 * y (images, rows, out_h, out_w) of the same dtype, contiguous, by weight (rows, channels / groups, kernel_h, kernel_w)
 * and bias (rows) or NULL. channels and rows are multiples of groups, whose outputs are neighbours.
 *
 * A row's products q * w are added in the order of the weight, product and sum each rounded to float32, then multiplied
 * by the scale; the bias is added last. The result is the same on every ISA and at any number of threads. Error against
 * the rounded x: at most about (columns + 2) * 2^-24 times the sum of |w| |x| and |bias|. NaN and infinity make NaN of
 * the windows that see them. isa: as in fewbit_linear. */
int fewbit_int8_windows(const fewbit_windows* windows, const void* x, int32_t dtype, int64_t images, int64_t groups,
                        const float* weight, int64_t rows, const float* bias, void* y, int32_t isa, int32_t threads);

/* Asks the system to hold [data, data + bytes), which should not have been written yet, in large pages: what is read from
 * end to end is read faster. Nothing else changes, and nothing happens where the system knows no such thing. */
void fewbit_large_pages(void* data, int64_t bytes);

/* Reads `bytes` of memory once and returns the exclusive or of its whole 128-byte groups, folded to 64 bits: a read
 * stream, to measure the machine's bandwidth beside a kernel. */
uint64_t fewbit_read_stream(const void* data, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
