// SPDX-License-Identifier: Apache-2.0
// Products with matrices of any kind, and rows of an embedding. Everything returns a status of fewbit.h.
#pragma once

#include <stddef.h>

#include <vector>

#include "core/pool.h"
#include "decode/steps.h"

namespace fewbit {

// work(unit) for every unit of [0, units), on at most `threads` threads.
template <class W>
void spread(int64_t units, int32_t threads, W&& work) {
  auto call = [](void* context, int64_t unit) { (*static_cast<W*>(context))(unit); };
  parallel(units, threads, call, &work);
}

// One matrix, and what it makes: (tokens, rows), y_stride floats apart.
struct Product {
  const fewbit_weight* weight;
  float* y;
  int64_t y_stride;
};

// What a call works with.
struct Means {
  const Steps* steps;
  int32_t threads;
  std::vector<float>* rewritten;         // grow as needed
  std::vector<fewbit_output>* outputs;
};

// Room for `count` floats.
inline float* room_for(std::vector<float>* memory, int64_t count) {
  if (static_cast<int64_t>(memory->size()) < count) memory->resize(static_cast<size_t>(count));
  return memory->data();
}

// Threads for work on `rows` rows, one by one.
inline int32_t threads_for(const Means& means, int64_t rows) { return rows < 8 ? 1 : means.threads; }

// x: (tokens, columns), x_stride floats apart. Neighbours that one kernel runs are computed in one call of it.
int multiply(const Means& means, const Product* products, int32_t count, const float* x, int64_t x_stride,
             int64_t tokens);

// out = scale * row `row` of the matrix, (columns); `scratch` grows as needed.
int look_up(const fewbit_weight& weight, int64_t row, float scale, std::vector<float>* scratch, float* out);

// Whether a weight is a matrix of rows x columns, or absent where that is allowed.
bool has_shape(const fewbit_weight& weight, int64_t rows, int64_t columns, bool may_be_absent);

}  // namespace fewbit
