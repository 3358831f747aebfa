// SPDX-License-Identifier: Apache-2.0
// What happens between matrix products, as a table of functions a row of which exists for every instruction set. Plain
// data only: this header is compiled under all of them.
#pragma once

#include <stdint.h>

#include "fewbit_decode.h"

namespace fewbit {

// Keys and values lie in blocks of kBlock positions. Of one head of one layer a block holds kBlock / kTile tiles of keys,
// then as many of values, then, where elements are codes, their scales, (2, kBlock) float16, keys first. A tile holds
// kTile positions: of keys one dimension after the other, (dim, kTile), so that scores are sums down the columns; of
// values one position after the other, (kTile, width), width = dim rounded up to kWidth by zeros. 8-bit codes are
// stored plus 128. 4-bit codes, plus 8, share bytes: of keys dimension 2i (low half) with 2i + 1; of values, dimension i
// of 32 (low half) with i + 16.
enum : int64_t { kBlock = 64, kTile = 16, kWidth = 32 };

// Positions whose weights are found together: a whole number of blocks.
enum : int64_t { kSpan = 512 };

// Bytes of one head of one layer in a block, and where its parts begin.
struct HeadLayout {
  int32_t kv;  // FEWBIT_FLOAT32, ..., FEWBIT_KV_INT4
  int64_t dim, width;
  int64_t key_tile, value_tile;  // bytes
  int64_t values, scales, bytes;
};

// One query head of one token against the keys of its sequence.
struct Query {
  const float* q;    // (dim)
  float* out;        // (dim)
  int64_t position;  // its own, the last one it sees
};

enum : int64_t { kQueries = 32, kMostHeadDim = 512 };  // that go through the keys together, and of a head: at most

struct AttentionTask {
  HeadLayout open, closed;          // of blocks that are still appended to, and of full ones
  const uint8_t* const* blocks;     // (blocks)
  const uint8_t* is_closed;         // (blocks)
  int64_t open_at, closed_at;       // bytes from the beginning of a block to this head of this layer
  const Query* queries;
  int64_t count;                    // of queries, at most kQueries
  int64_t window;                   // 0: all positions
  float scale, cap;
  const uint8_t* next;              // the head that the task after this one reads first, to be fetched early; or null
};

struct DenseTask {
  const void* weight;  // (rows, columns) of dtype
  int32_t dtype;
  int64_t rows, columns, tokens;
  const float* x;      // (tokens, columns), x_stride apart
  int64_t x_stride;
  const float* bias;   // (rows) or null
  float* y;            // (tokens, rows), y_stride apart
  int64_t y_stride;
};

// A token and how likely it is: the higher the value, and of equals the lower the token.
struct Candidate {
  float value;
  int32_t token;
};

struct Steps {
  // out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
  void (*norm)(const float* x, const float* weight, float eps, int64_t count, float* out);
  // x += y
  void (*add)(float* x, const float* y, int64_t count);
  // x += share * y
  void (*add_share)(float* x, float share, const float* y, int64_t count);
  // Pairs (i, i + pairs) of x by cos and sin, (pairs).
  void (*rotate)(float* x, int64_t pairs, const float* cos, const float* sin);
  // out = act(gate) * up
  void (*gate)(int32_t activation, const float* gate, const float* up, int64_t count, float* out);
  // x = cap * tanh(x * scale / cap); cap 0: x * scale.
  void (*cap)(float* x, float scale, float cap, int64_t count);
  // Every `block` of x, a power of two, times Sylvester's Hadamard matrix.
  void (*hadamard)(float* x, int64_t block, int64_t count);
  // out = x M over the first axis of x, (order, block), M being (order, order).
  void (*mix)(const float* x, const float* matrix, int64_t order, int64_t block, float* out);
  // out = x * factor
  void (*scale)(const float* x, const float* factor, int64_t count, float* out);
  // out = x rounded.
  void (*round)(const fewbit_rounding& rounding, const float* x, int64_t count, float* out);
  // small = x where |x| < threshold or x is NaN, large = x elsewhere, each 0 where the other is not; whether any is large.
  bool (*split)(const float* x, float threshold, int64_t count, float* small, float* large);
  // x = softmax(x)
  void (*softmax)(float* x, int64_t count);
  // Writes the key and the value of one position, (dim) each, into its place of a block.
  void (*append)(const HeadLayout& layout, uint8_t* head, int64_t position, const float* key, const float* value);
  // Float16 to codes, a whole block of one head; and back.
  void (*close)(const HeadLayout& open, const uint8_t* from, const HeadLayout& closed, uint8_t* to);
  void (*reopen)(const HeadLayout& closed, const uint8_t* from, const HeadLayout& open, uint8_t* to);
  void (*attend)(const AttentionTask& task);
  // Rows [begin, end) of y.
  void (*dense)(const DenseTask& task, int64_t begin, int64_t end);
  // Of a draw: the largest of x, or NaN where any is not finite;
  float (*largest)(const float* x, int64_t count);
  // x = e^((x - most) / temperature) of the tokens that stay, 0 of the others;
  void (*shares)(float* x, int64_t count, float most, float temperature, Candidate last);
  // x = 0 of those that do not, or are below `least`;
  void (*cut)(float* x, int64_t count, float least, Candidate last);
  // the sum of x.
  double (*sum)(const float* x, int64_t count);
};

extern const Steps decode_steps_serial, decode_steps_avx2, decode_steps_avx512, decode_steps_neon;

// The best row here that `isa` allows, or null.
const Steps* steps_of(int32_t isa);

// The best row here.
const Steps& best_steps();

HeadLayout layout_of(int32_t kv, int64_t dim);

}  // namespace fewbit
