// SPDX-License-Identifier: Apache-2.0
// What fewbit_column_sums says, compiled for the instruction set of the file that includes this: columns side by side
// in vectors, rows one after another.
#pragma once

#include "core/grid_round.h"

namespace fewbit {
namespace {

constexpr int64_t kStretch = FEWBIT_STRETCH, kRowsAtOnce = 8;

inline float magnitude(float x) { return x < 0 ? -x : x; }

// Sums of one column, or of kLanes of them.
template <class V>
struct ColumnSums {
  V total = {}, square = {}, magnitudes = {}, largest = {};

  void add(V x) {
    const V size = magnitude(x);
    total += x, square += x * x, magnitudes += size;
    largest = most(size, largest);
  }

  void add(const ColumnSums& other) {
    total += other.total, square += other.square, magnitudes += other.magnitudes;
    largest = most(other.largest, largest);
  }

  void load(const float* sums, int64_t columns) {
    memcpy(&total, sums, sizeof(V)), memcpy(&square, sums + columns, sizeof(V));
    memcpy(&magnitudes, sums + 2 * columns, sizeof(V)), memcpy(&largest, sums + 3 * columns, sizeof(V));
  }

  void store(float* sums, int64_t columns) const {
    memcpy(sums, &total, sizeof(V)), memcpy(sums + columns, &square, sizeof(V));
    memcpy(sums + 2 * columns, &magnitudes, sizeof(V)), memcpy(sums + 3 * columns, &largest, sizeof(V));
  }
};

// Adds rows of one column, or of kLanes, `columns` apart in x, to those of `sums`.
template <class V>
void add_rows(const float* x, int64_t rows, int64_t columns, float* sums) {
  ColumnSums<V> all;
  all.load(sums, columns);
  for (int64_t row = 0; row < rows; row++) {
    V values;
    memcpy(&values, x + row * columns, sizeof values);
    all.add(values);
  }
  all.store(sums, columns);
}

template <class V>
void join(const float* part, int64_t columns, float* sums) {
  ColumnSums<V> all, some;
  all.load(sums, columns), some.load(part, columns);
  all.add(some);
  all.store(sums, columns);
}

// Memory is read in order, a few rows at a time, which are added to what lies in the first level of the cache.
void column_sums_any(const float* x, int64_t rows, int64_t columns, float* sums, float* scratch) {
  const size_t bytes = static_cast<size_t>(4 * columns) * sizeof(float);
  const int64_t whole = columns - columns % kLanes;
  memset(sums, 0, bytes);
  for (int64_t begin = 0; begin < rows; begin += kStretch) {
    const int64_t end = begin + kStretch < rows ? begin + kStretch : rows;
    memset(scratch, 0, bytes);
    for (int64_t row = begin; row < end; row += kRowsAtOnce) {
      const int64_t some = row + kRowsAtOnce < end ? kRowsAtOnce : end - row;
      const float* const at = x + row * columns;
      for (int64_t c = 0; c < whole; c += kLanes) add_rows<Lanes>(at + c, some, columns, scratch + c);
      for (int64_t c = whole; c < columns; c++) add_rows<float>(at + c, some, columns, scratch + c);
    }
    for (int64_t c = 0; c < whole; c += kLanes) join<Lanes>(scratch + c, columns, sums + c);
    for (int64_t c = whole; c < columns; c++) join<float>(scratch + c, columns, sums + c);
  }
  // NaN is lost in comparisons, and not in sums.
  const float* magnitudes = sums + 2 * columns;
  float* largest = sums + 3 * columns;
  for (int64_t c = 0; c < columns; c++) largest[c] = magnitudes[c] == magnitudes[c] ? largest[c] : magnitudes[c];
}

}  // namespace
}  // namespace fewbit
