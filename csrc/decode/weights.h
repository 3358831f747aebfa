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

// Memory that nested calls take and give back, the last taken first; it grows as needed and is used again.
struct Rooms {
  std::vector<std::vector<float>> memory;
  size_t taken = 0;
};

// What a call works with.
struct Means {
  const Steps* steps;
  int32_t threads;
  std::vector<float>* rewritten;         // grow as needed
  std::vector<fewbit_output>* outputs;
  Rooms* rooms;
};

// Room for `count` floats.
inline float* room_for(std::vector<float>* memory, int64_t count) {
  if (static_cast<int64_t>(memory->size()) < count) memory->resize(static_cast<size_t>(count));
  return memory->data();
}

// `count` floats until the end of a scope.
class Room {
 public:
  Room(Rooms* rooms, int64_t count) : rooms_(rooms) {
    if (rooms->memory.size() == rooms->taken) rooms->memory.emplace_back();
    data_ = room_for(&rooms->memory[rooms->taken], count);
    rooms->taken++;
  }
  ~Room() { rooms_->taken--; }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  float* data() const { return data_; }

 private:
  Rooms* rooms_;
  float* data_;
};

// Threads for work on `rows` rows, one by one.
inline int32_t threads_for(const Means& means, int64_t rows) { return rows < 8 ? 1 : means.threads; }

// x: (tokens, columns), x_stride floats apart. Neighbours that one kernel runs are computed in one call of it.
int multiply(const Means& means, const Product* products, int32_t count, const float* x, int64_t x_stride,
             int64_t tokens);

// Whether two matrices of the same activations are computed by one call of one kernel.
bool together(const fewbit_weight& a, const fewbit_weight& b);

// The matrices of products [0, count), together, or one that has no terms; x as they want it.
int multiply_matrices(const Means& means, const Product* products, int32_t count, const fewbit_input& x);

// A matrix of any kind: y = x w^T + bias, or y += that where `add`.
int onto(const Means& means, const Product& product, const fewbit_input& x, bool add);

// out = scale * row `row` of the matrix, (columns); `scratch` grows as needed.
int look_up(const fewbit_weight& weight, int64_t row, float scale, std::vector<float>* scratch, float* out);

// Whether a weight is of a kind whose rows can be looked up.
bool has_rows(const fewbit_weight& weight);

// Whether a weight is a matrix of rows x columns, or absent where that is allowed.
bool has_shape(const fewbit_weight& weight, int64_t rows, int64_t columns, bool may_be_absent);

// The same of one that has terms.
bool has_terms(const fewbit_weight& weight);

}  // namespace fewbit
