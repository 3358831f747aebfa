// SPDX-License-Identifier: Apache-2.0
// What the driver and the per-ISA kernels agree on. Plain data only: this header is compiled under every instruction
// set, so it must hold no inline function.
#pragma once

#include <stdint.h>

#include "fewbit.h"

namespace fewbit {

// Whether this processor reads memory fastest from end to end, and not from several places in turn.
bool reads_straight();

// Matrices that are computed from one panel, or from activations rounded once: at most.
enum : int32_t { kMostShared = 8 };

// Work common to all calls of a kernel within one fewbit_linear. Shapes in words; tile = 16 rows, chunk = 32 columns.
struct Task {
  int32_t bits;
  int32_t scale_half, offset_half;
  bool generic;            // blocks are not whole chunks: slower, any block size
  int64_t rows, columns, chunks;
  int64_t block, blocks;   // columns a block; blocks a row
  float zero;
  const uint8_t* codes;    // (tiles, chunks, bits, 16) uint32
  const void* scale;       // (tiles, blocks, 16)
  const void* offset;      // (tiles, blocks, 16) or null
  const float* table;      // (2^bits) or null
  // Activations as the kernel wants them: (tokens / together, chunks, together, panel floats). Tokens that are computed
  // together lie together, else rows that are a power of two long would fight for the same cache sets. Padded with
  // zeros to whole groups of tokens.
  const float* panel;
  int64_t together;
  const float* sums;       // (padded tokens, blocks): sum of the activations of a block; null when nothing needs it
  const float* bias;       // (rows) or null
  void* y;                 // (tokens, rows) of y_dtype, y_stride elements apart
  int64_t y_stride;
  int32_t y_dtype;
};

// One family on one instruction set.
struct Kernel {
  // Floats that a chunk of 32 activations takes in the panel.
  int64_t (*panel_floats)(int32_t bits, bool generic);
  // Writes `chunks` chunks of a token's panel, `stride` floats apart, from x, of which `columns` exist (the others
  // count as 0).
  void (*panel)(int32_t bits, bool generic, const float* table, const float* x, int64_t columns, int64_t chunks,
                float* out, int64_t stride);
  // Computes y for tiles [tile_begin, tile_end) and tokens [0, tokens) of the panel.
  void (*run)(const Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens);
  // Writes the weights of one tile: out[column * stride + row of the tile].
  void (*decode)(const Task& task, int64_t tile, float* out, int64_t stride);
};

// A table of levels as integers: table[code] = step * level[code]. Exactly, where all entries are multiples of a step
// of which the largest is at most 32767; else to within half a step of 1 / 32767 of the largest.
struct FixedPoint {
  int16_t level[256];
  float step;
  int32_t most;  // the largest |level|
};

enum : int32_t { kLookedUp = 6, kLookedUp24 = 4 };  // bits of a code, at most: times int8, times FEWBIT_INT24

// False where an entry of table, (2^bits), is NaN or infinity.
bool fixed_point(const float* table, int32_t bits, FixedPoint* out);

// Work of a kernel that sums segments up: levels times activations that were rounded to int8, or came as bfloat16. A
// segment is a run of whole chunks in one block of the weight and one of the activations: a whole row of codes, or at most
// kSegment columns. Sums of integers over a segment are exact: in float32 for codes, because |code * activation| summed
// stays below 2^24; in int32 for levels of 16 bits, because 32767 * 128 * 256 < 2^31.
struct SegmentTask {
  int32_t bits;
  int32_t scale_half, offset_half;
  int64_t rows, columns, chunks;
  int64_t segments, segment_chunks;   // segments a row; chunks a segment, the last one possibly short
  int64_t blocks, block_segments;     // blocks of the weight a row; segments a block
  int64_t x_blocks, x_block_segments; // likewise of the activations
  float whole;             // of the zero, the integer by which sums begin lower, for each activation
  float zero;              // the rest of it
  bool shifted;            // whether there is an offset, or such a rest
  float centre;            // what a code is lessened by before it is multiplied
  const uint8_t* codes;    // as in Task
  const void* scale;
  const void* offset;
  const FixedPoint* table; // of FEWBIT_LUT times int8, else null
  const float* entries;    // of FEWBIT_LUT times FEWBIT_INT24, else null
  int64_t digits;          // rows of activations that a token takes
  int64_t together;        // rows that are computed together: whole tokens
  bool alone;              // whether few tokens take row groups one by one, as they lie in memory
  bool arranged;           // whether codes lie in halves16 or bytes16
  void* activations;       // (rows / together, chunks, together, 32), each kernel->bytes
  int32_t* starts;         // (rows / together, chunks, together, kernel->starts): see spans.h
  int32_t* rests;          // (rows, chunks, kernel->rests): what rows leave out, or other starts
  float* x_scale;          // (padded rows, x_blocks)
  float* sums;             // (rows / together, segments, together): sum of the int8 activations of a segment, an exact integer
  const float* bias;
  void* y;
  int64_t y_stride;
  int32_t y_dtype;
};

// Columns a segment that is no whole row, rows of activations made at a time: at most. Digits of a token that becomes integers of 24 bits.
enum : int64_t { kSegment = 256, kRoundedTokens = 128, kDigits = 3 };

// Levels of one family times int8 activations on one instruction set.
struct SegmentKernel {
  int64_t most;    // rows of activations computed together where there are many
  int64_t bytes;   // of a rounded activation
  int64_t digits;  // rows of activations that a token takes: 1 or kDigits
  // Rounds token `token` of x, or fills it with zeros where x has no such token.
  void (*prepare)(const SegmentTask& task, const fewbit_input& x, int64_t token);
  // Computes y for tiles [tile_begin, tile_end) and tokens [0, tokens) of the prepared activations.
  void (*run)(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens);
  // int32s of SegmentTask::starts for 32 activations of a row: these differ by the bits of a matrix. 0: there are none.
  int64_t starts = 0;
  int64_t rests = 0;  // int32s of SegmentTask::rests, likewise
};

// Tables times int8 activations on one instruction set: levels of at most `most` as bytes, any other as words.
struct LutKernels {
  int32_t most;
  SegmentKernel bytes, words;
};

// One or two tokens on an instruction set that computes them by a kernel of their own: codes of at most `most` bits, or tables
// of levels of at most `most`; of FEWBIT_INT24, any number of tokens times codes of at most `most` bits, and one or two others.
struct FewKernel {
  int32_t most;
  SegmentKernel kernel;
};

// Work of a kernel that counts signs which differ: one scale a row of the weight, and one a token.
struct XnorTask {
  static constexpr int32_t bits = 1;
  static constexpr int64_t blocks = 1;
  int32_t scale_half;
  int64_t rows, columns, chunks;
  const uint8_t* codes;  // as in Task
  const void* scale;     // (tiles, 16)
  int64_t together;      // tokens that are computed together
  uint32_t* words;       // (tokens / together, chunks, together, words of the kernel)
  float* x_scale;        // (padded tokens): half of what the format says, since scale is twice what it says
  const float* bias;
  void* y;
  int64_t y_stride;
  int32_t y_dtype;
};

// Signs times signs on one instruction set.
struct XnorKernel {
  int64_t most;   // tokens computed together where there are many
  int64_t words;  // that 32 columns of a token take
  // As that of SegmentKernel.
  void (*prepare)(const XnorTask& task, const fewbit_input& x, int64_t token);
  // Computes y for tiles [tile_begin, tile_end) and tokens [0, tokens) of the prepared activations.
  void (*run)(const XnorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens);
};

// Work of a kernel that adds sparse entries to y.
struct SparseTask {
  const fewbit_sparse* matrix;
  const float* panel;  // activations (columns + 1, together); the last column is zeros, for entries that pad
  int64_t together;    // 1 or kSparseTokens
  int64_t tokens;      // of these, that exist
  float* y;            // (tokens, rows), y_stride apart
  int64_t y_stride;
};

enum : int64_t { kSparseTokens = 8, kSlice = 8, kWindow = 256 };

// One instruction set: adds the rows of one window, kWindow rows.
struct SparseKernel {
  void (*run)(const SparseTask& task, int64_t window);
};

extern const SparseKernel sparse_add_serial, sparse_add_avx2, sparse_add_neon;

// Work of a kernel whose codes index vectors: see fewbit_vectors. A tile is eight codes of every column.
struct VectorTask {
  int32_t bits, residual_bits;
  int32_t dim, width;       // rows of a code; floats of an entry: dim rounded up to 4, 8 or 16
  int32_t half;
  int64_t rows, columns, block;
  const uint8_t* codes;     // (tiles, columns, bits + residual_bits)
  const void* book;         // (blocks, 2^bits, width)
  const void* residual;     // (blocks, 2^residual_bits, width) or null
  int64_t tokens, together; // tokens that are computed together: 1, 2, 4 or 8
  const float* panel;       // activations: (tokens / together, columns, together), padded with zeros
  const float* bias;
  void* y;
  int64_t y_stride;
  int32_t y_dtype;
};

// Vectors of a codebook on one instruction set.
struct VectorKernel {
  int64_t most;  // tokens computed together where there are many
  // Computes y for one tile.
  void (*run)(const VectorTask& task, int64_t tile);
  // Writes the weights of one tile: out[column * stride + row of the tile].
  void (*decode)(const VectorTask& task, int64_t tile, float* out, int64_t stride);
};

enum : int32_t { kMostDim = 16 };  // rows that a code spans: at most

// Work of a kernel whose codes index vectors of bytes: see fewbit_byte_vectors. `rows` and tiles count codes.
struct Int8VectorTask : SegmentTask {
  int32_t residual_bits, books;  // 1 or 2
  bool wide;                     // whether some index has more than 8 bits
  int64_t dim, entries;          // rows of a code; bytes of a row of a book that is not wide: 64 or 256
  int64_t width;                 // bytes of an entry of a book that is wide: 8 or 16
  int64_t book_bytes;            // of the books of a block
  int64_t out_rows;              // rows of y
  const uint8_t* book;           // (blocks, book_bytes)
  const float *vector_step, *vector_offset;  // (blocks, dim)
  float* start;                  // (padded tokens, dim): what the offsets contribute
};

enum : int64_t { kMostTogether = 16 };  // tokens, where books are wide

// Vectors of bytes times int8 activations on one instruction set.
struct Int8VectorKernel {
  int64_t most, most_wide;  // tokens computed together where there are many, the latter of wide books
  int64_t bytes;            // of a rounded activation
  // As those of SegmentKernel.
  void (*prepare)(const Int8VectorTask& task, const fewbit_input& x, int64_t token);
  void (*run)(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens);
};

// Work of a kernel whose rows have tables of their own: see fewbit_row_tables.
struct RowTask {
  int32_t bits;
  int32_t table_half;
  int64_t rows, columns, chunks;
  int64_t blocks, block_chunks;  // blocks of a row; chunks of one
  int64_t table_rows;            // rows that share a table
  const uint8_t* codes;          // (rows, bytes of a row), in row16
  const void* table;             // (tables, 2^bits)
  const float* scale;            // (rows, blocks)
  int64_t tokens, together;      // at most kRowPanel; tokens that are computed together: 1 or kRowTokens
  const float* panel;            // activations (tokens, whole chunks of columns), padded with zeros
  const float* bias;
  void* y;
  int64_t y_stride;
  int32_t y_dtype;
};

enum : int64_t { kRowTokens = 4, kRowChunks = 4, kRowPanel = 32 };  // chunks whose parts lie together: see fewbit_row_tables
// Rows that are fetched ahead of several side by side, which are no stream that the processor foresees: in order of memory.
enum : int64_t { kRowsAhead = 8 };

// Tables of rows on one instruction set.
struct RowKernel {
  // Computes y for rows [begin, end).
  void (*run)(const RowTask& task, int64_t begin, int64_t end);
  // Writes the weights of one row: out[column].
  void (*decode)(const RowTask& task, int64_t row, float* out);
};

// Work of a kernel of integers whose rows have tables of their own: see fewbit_row_linear_int8.
struct Int8RowTask {
  int32_t bits;
  int64_t rows, columns, chunks;
  int64_t padded;          // columns of whole vectors of chunks
  int64_t table_rows;      // rows that share a table
  const uint8_t* codes;    // (rows, bytes of a row), in row16
  const uint8_t* levels;   // (tables, 16)
  const float* factor;     // (rows)
  int64_t together;        // tokens that are computed together: 1 or kRowTokens
  bool halves;             // whether codes lie in rowhalves16
  void* activations;       // (padded tokens, padded) bytes
  float* x_scale;          // (padded tokens)
  int32_t* sums;           // (padded tokens): sum of the int8 activations
  int32_t* rests;          // (padded tokens, padded / 32, kernel->rests)
  const float* bias;
  void* y;
  int64_t y_stride;
  int32_t y_dtype;
};

// Tables of rows times int8 activations on one instruction set.
struct Int8RowKernel {
  // As those of SegmentKernel.
  void (*prepare)(const Int8RowTask& task, const fewbit_input& x, int64_t token);
  void (*run)(const Int8RowTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens);
  int64_t rests = 0;  // int32s of Int8RowTask::rests
};

extern const Int8RowKernel int8_row_lut_linear_serial, int8_row_lut_linear_avx2, int8_row_lut_linear_avxvnni,
    int8_row_lut_linear_avx512vnni, int8_row_lut_linear_neondot;

extern const RowKernel row_lut_linear_serial, row_lut_linear_avx2, row_lut_linear_avx512, row_lut_linear_neon;

extern const Int8VectorKernel int8_vector_linear_serial, int8_vector_linear_avx2, int8_vector_linear_avx512vbmi;

extern const VectorKernel vector_linear_serial, vector_linear_avx2, vector_linear_avx512, vector_linear_neon;

extern const XnorKernel xnor_linear_serial, xnor_linear_avx2, xnor_linear_avx512vpopcnt, xnor_linear_neon;

// For bfloat16 activations.
extern const SegmentKernel bf16_linear_avx512bf16;
extern const SegmentKernel int24_linear_serial, int24_linear_avx2, int24_linear_avxvnni, int24_linear_avx512vnni,
    int24_linear_neondot, int24_linear_neoni8mm;
extern const SegmentKernel int24_lut_linear_serial, int24_lut_linear_avx2;
extern const SegmentKernel int8_linear_serial, int8_linear_avx2, int8_linear_avxvnni, int8_linear_avx512vnni,
    int8_linear_neon, int8_linear_neondot, int8_linear_neoni8mm;
extern const LutKernels int8_lut_linear_serial, int8_lut_linear_avx2, int8_lut_linear_avxvnni, int8_lut_linear_avx512vnni,
    int8_lut_linear_neon, int8_lut_linear_neondot, int8_lut_linear_neoni8mm;

extern const SegmentKernel int8_bits_linear_avx2;   // of 1 bit and three tokens or more
extern const SegmentKernel int8_split_linear_avx2, int8_few_split_linear_avx2;  // of 8 bits: three tokens or more; one or two
extern const FewKernel int8_level_linear_avx2;         // levels of at most `most`, the same
extern const FewKernel int8_few_linear_avx2, int8_few_lut_linear_avx2, int24_few_lut_linear_avx2;

extern const Kernel affine_linear_serial, lut_linear_serial;
extern const Kernel affine_linear_avx2, lut_linear_avx2;
extern const Kernel affine_linear_avx512, lut_linear_avx512;
extern const Kernel affine_linear_neon, lut_linear_neon;

}  // namespace fewbit
