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

// sum[lane] of one token, over `steps` steps.
template <class Index, class Value>
inline void sum_one(const Index* index, const Value* value, int64_t steps, const float* x, float (&sum)[kSlice]) {
  for (int64_t k = 0; k < steps; k++, index += kSlice, value += kSlice) {
    __builtin_prefetch(index + kAhead);
    __builtin_prefetch(value + kAhead);
    float w[kSlice];
    widen(value, w);
#pragma GCC unroll 8
    for (int i = 0; i < kSlice; i++) sum[i] += w[i] * x[index[i]];
  }
}

// sum[lane] of kSparseTokens tokens.
template <class Index, class Value>
inline void sum_many(const Index* index, const Value* value, int64_t steps, const float* x,
                     F (&sum)[kSlice][kVectors]) {
  for (int64_t k = 0; k < steps; k++, index += kSlice, value += kSlice) {
    float w[kSlice];
    widen(value, w);
#pragma GCC unroll 8
    for (int i = 0; i < kSlice; i++) {
      const F here = broadcast(w[i]);
      const float* column = x + static_cast<int64_t>(index[i]) * kSparseTokens;
      for (int v = 0; v < kVectors; v++)
        sum[i][v] = add(sum[i][v], multiply(here, load(column + v * kLanes)));
    }
  }
}

template <class Index, class Value>
void add_slices(const SparseTask& task, int64_t window) {
  const fewbit_sparse& w = *task.matrix;
  const int64_t slices = (w.rows + kSlice - 1) / kSlice, first = window * (kWindow / kSlice);
  const int64_t last = first + kWindow / kSlice < slices ? first + kWindow / kSlice : slices;
  for (int64_t s = first; s < last; s++) {
    const int64_t at = w.start[s] * kSlice, steps = w.start[s + 1] - w.start[s];
    if (!steps) continue;
    const Index* index = static_cast<const Index*>(w.index) + at;
    const Value* value = static_cast<const Value*>(w.value) + at;
    float sums[kSlice][kSparseTokens] = {};
    if (task.together == 1) {
      float sum[kSlice] = {};
      sum_one(index, value, steps, task.panel, sum);
      for (int i = 0; i < kSlice; i++) sums[i][0] = sum[i];
    } else {
      F sum[kSlice][kVectors];
      for (auto& lane : sum)
        for (F& part : lane) part = broadcast(0.0f);
      sum_many(index, value, steps, task.panel, sum);
      for (int i = 0; i < kSlice; i++)
        for (int v = 0; v < kVectors; v++) store(sums[i] + v * kLanes, sum[i][v]);
    }
    for (int i = 0; i < kSlice; i++) {
      const int64_t row = window * kWindow + w.order[s * kSlice + i];
      if (row >= w.rows) continue;
      for (int64_t t = 0; t < task.tokens; t++) task.y[t * task.y_stride + row] += sums[i][t];
    }
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
