// SPDX-License-Identifier: Apache-2.0
// The loop of fewbit_sparse_add, over the vector type of the file that includes it, after that file's simd.h. A vector
// holds tokens: an entry is one broadcast value times its column's row of the panel. One token alone has no such rows;
// its eight sums, one a lane of the slice, are chains that do not wait for one another. Gathered activations were slower
// than eight scalar loads. Product and sum are rounded apart, so that all ways give one result.
#pragma once

#include <stdint.h>

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kVectors = static_cast<int>(kSparseTokens) / kLanes;
constexpr int64_t kAhead = 1024;  // entries: far enough for memory to answer

inline void widen(const float* value, float (&out)[kSlice]) {
  for (int i = 0; i < kSlice; i += kLanes) store(out + i, load(value + i));
}

inline void widen(const uint16_t* value, float (&out)[kSlice]) {
  for (int i = 0; i < kSlice; i += kLanes) store(out + i, load_half(value + i));
}

// Steps of one slice, of the types in which a matrix holds them; y points at the window's first row.
template <class Index, class Value>
struct Slice {
  const Index* index;
  const Value* value;
  int64_t steps, rows;   // rows of the window
  const uint8_t* order;
  float* y;
};

template <class Index, class Value>
inline void add_one(const SparseTask& task, const Slice<Index, Value>& slice) {
  const Index* index = slice.index;
  const Value* value = slice.value;
  float sum[kSlice] = {};
  for (int64_t k = 0; k < slice.steps; k++, index += kSlice, value += kSlice) {
    __builtin_prefetch(index + kAhead);
    __builtin_prefetch(value + kAhead);
    float w[kSlice];
    widen(value, w);
#pragma GCC unroll 8
    for (int i = 0; i < kSlice; i++) sum[i] += w[i] * task.panel[index[i]];
  }
  for (int i = 0; i < kSlice; i++)
    if (slice.order[i] < slice.rows) slice.y[slice.order[i]] += sum[i];
}

template <class Index, class Value>
inline void add_many(const SparseTask& task, const Slice<Index, Value>& slice) {
  const Index* index = slice.index;
  const Value* value = slice.value;
  F sum[kSlice][kVectors];
  for (auto& lane : sum)
    for (F& part : lane) part = broadcast(0.0f);
  for (int64_t k = 0; k < slice.steps; k++, index += kSlice, value += kSlice) {
    float w[kSlice];
    widen(value, w);
#pragma GCC unroll 8
    for (int i = 0; i < kSlice; i++) {
      const F here = broadcast(w[i]);
      const float* x = task.panel + static_cast<int64_t>(index[i]) * kSparseTokens;
      for (int v = 0; v < kVectors; v++) sum[i][v] = add(sum[i][v], multiply(here, load(x + v * kLanes)));
    }
  }
  for (int i = 0; i < kSlice; i++) {
    if (slice.order[i] >= slice.rows) continue;
    float tokens[kSparseTokens];
    for (int v = 0; v < kVectors; v++) store(tokens + v * kLanes, sum[i][v]);
    for (int64_t t = 0; t < task.tokens; t++) slice.y[t * task.y_stride + slice.order[i]] += tokens[t];
  }
}

template <class Index, class Value>
void add_slices(const SparseTask& task, int64_t window) {
  const fewbit_sparse& w = *task.matrix;
  const int64_t slices = (w.rows + kSlice - 1) / kSlice, first = window * (kWindow / kSlice);
  const int64_t last = first + kWindow / kSlice < slices ? first + kWindow / kSlice : slices;
  for (int64_t s = first; s < last; s++) {
    const int64_t at = w.start[s] * kSlice, row = window * kWindow;
    const Slice<Index, Value> slice = {static_cast<const Index*>(w.index) + at,
                                       static_cast<const Value*>(w.value) + at,
                                       w.start[s + 1] - w.start[s],
                                       w.rows - row,
                                       w.order + s * kSlice,
                                       task.y + row};
    if (!slice.steps) continue;
    if (task.together == 1) add_one(task, slice);
    else add_many(task, slice);
  }
}

inline void add_window(const SparseTask& task, int64_t window) {
  const fewbit_sparse& w = *task.matrix;
  if (w.index_bytes == 2) {
    if (w.value_half) add_slices<uint16_t, uint16_t>(task, window);
    else add_slices<uint16_t, float>(task, window);
  } else {
    if (w.value_half) add_slices<int32_t, uint16_t>(task, window);
    else add_slices<int32_t, float>(task, window);
  }
}

}  // namespace
}  // namespace fewbit
