// SPDX-License-Identifier: Apache-2.0
// What fewbit_linear_many asks of the drivers of float and of integer products.
#pragma once

#include "fewbit.h"

namespace fewbit {

struct Products {
  // Whether a well-formed matrix can be multiplied; x_block as in fewbit_linear_many.
  bool (*sensible)(const fewbit_matrix& matrix, int64_t x_block);
  // Whether activations prepared for `a` are those that `b` needs.
  bool (*shared)(const fewbit_matrix& a, const fewbit_matrix& b, int64_t x_block);
  // Computes the outputs of up to kMostShared matrices that share activations, of which there is a token or more.
  int (*run)(const fewbit_output* outputs, int32_t count, const fewbit_input& x, int64_t x_block, int32_t y_dtype,
             int32_t isa, int32_t threads);
};

extern const Products float_products, int8_products;

// What any matrix must be.
bool well_formed(const fewbit_matrix& matrix);

// Tokens of x from `token`, at most `tokens`.
fewbit_input tokens_of(const fewbit_input& x, int64_t token, int64_t tokens);

// Rows of y from `token`.
void* rows_of(const fewbit_output& output, int32_t dtype, int64_t token);

}  // namespace fewbit
