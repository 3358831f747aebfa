// SPDX-License-Identifier: Apache-2.0
// What fewbit_linear_many asks of the drivers of float products, of those summed by segments (integers, bfloat16), and of
// signs; and what these share.
#pragma once

#include <stdint.h>

#include "fewbit.h"

namespace fewbit {

struct Products {
  // Whether a well-formed matrix can be multiplied; x_block as in fewbit_linear_many.
  bool (*sensible)(const fewbit_matrix& matrix, int64_t x_block);
  // Whether activations prepared for `a` are those that `b` needs.
  bool (*shared)(const fewbit_matrix& a, const fewbit_matrix& b, int64_t x_block);
  // Computes the outputs of up to kMostShared matrices that share activations.
  int (*run)(const fewbit_output* outputs, int32_t count, const fewbit_input& x, int64_t x_block, int32_t y_dtype,
             int32_t isa, int32_t threads);
};

extern const Products float_products, segment_products, sign_products;

// The instruction set of float kernels on a machine that has `isa`: weights are decoded by it, whichever multiplies them.
int32_t float_isa(int32_t isa);

// What any matrix, and any activations, must be.
bool well_formed(const fewbit_matrix& matrix);
bool well_formed(const fewbit_input& x);
bool known_dtype(int32_t dtype);

// Columns a segment: the longest that stays within a block of either side; 0 where blocks are not whole chunks. `x_block`
// as in fewbit_linear_many.
int64_t segment_columns(int64_t columns, int64_t block, int64_t x_block);

// Tokens of x from `token`, at most `tokens`.
fewbit_input tokens_of(const fewbit_input& x, int64_t token, int64_t tokens);

// Rows of y from `token`.
void* rows_of(const fewbit_output& output, int32_t dtype, int64_t token);

namespace {

constexpr int64_t kTilesPerUnit = 4;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t units_of(int64_t rows) { return ceil_div(rows, 16 * kTilesPerUnit); }

// Tokens at a time: as many whole `together` as `most` allow, one `together` at least, and no more than there are.
inline int64_t group_of(int64_t tokens, int64_t together, int64_t most) {
  const int64_t fit = most / together * together;
  return least(round_up(tokens, together), fit < together ? together : fit);
}

// Unit = kTilesPerUnit row tiles of one of the call's matrices, counted through all of them.
template <class Call>
void compute(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const auto* task = call.task;
  for (; unit >= units_of(task->rows); task++) unit -= units_of(task->rows);
  const int64_t begin = unit * kTilesPerUnit;
  call.kernel->run(*task, begin, least(begin + kTilesPerUnit, ceil_div(task->rows, 16)), call.x.tokens);
}

}  // namespace
}  // namespace fewbit
