// SPDX-License-Identifier: Apache-2.0
// What the driver and the per-ISA kernels agree on. Plain data only: this header is compiled under every instruction
// set, so it must hold no inline function.
#pragma once

#include <stdint.h>

namespace fewbit {

// How a call is computed. It depends on the shape, never on the threads.
enum Mode : int32_t {
  kSingle,   // one or two tokens: bound by decoding and by memory
  kBatch,    // from kBatchTokens on: bound by multiply-adds, a decoded weight serves up to 8 tokens
  kGeneric,  // blocks that are not whole chunks of 32 columns: slower, any block size
};

enum : int64_t { kBatchTokens = 3 };

// Work common to all calls of a kernel within one fewbit_linear. Shapes in words; tile = 16 rows, chunk = 32 columns.
struct Task {
  int32_t bits;
  int32_t scale_half, offset_half;
  Mode mode;
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
  float* y;                // (tokens, rows), y_stride floats apart
  int64_t y_stride;
};

// One family on one instruction set.
struct Kernel {
  // Floats that a chunk of 32 activations takes in the panel.
  int64_t (*panel_floats)(int32_t bits, Mode mode);
  // Writes `chunks` chunks of a token's panel, `stride` floats apart, from x, of which `columns` exist (the others
  // count as 0).
  void (*panel)(int32_t bits, Mode mode, const float* table, const float* x, int64_t columns, int64_t chunks,
                float* out, int64_t stride);
  // Computes y for tiles [tile_begin, tile_end) and tokens [0, tokens) of the panel.
  void (*run)(const Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens);
};

extern const Kernel affine_linear_serial, lut_linear_serial;
extern const Kernel affine_linear_avx2, lut_linear_avx2;
extern const Kernel affine_linear_avx512, lut_linear_avx512;
extern const Kernel affine_linear_neon, lut_linear_neon;

}  // namespace fewbit
