// SPDX-License-Identifier: Apache-2.0
// Rounding to even grids, the squares it loses, and codes packed as fields, against their definitions, from buffers of
// exactly the size they need (so that a sanitizer sees any stray read or write). Searches and sweeps are tested from Python.
#include <math.h>
#include <stdio.h>

#include <vector>

#include "core/dtypes.h"
#include "fewbit.h"
#include "fewbit_grids.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t columns, int64_t detail) {
  if (holds) return;
  failures++;
  printf("FAILED %s: %lld columns, %lld\n", what, static_cast<long long>(columns), static_cast<long long>(detail));
}

uint32_t state = 1;
uint32_t drawn() { return state = state * 1664525u + 1013904223u; }

size_t size(int64_t n) { return static_cast<size_t>(n); }

void check_fields(int64_t columns, int32_t bits) {
  const int64_t rows = 3, bytes = (columns * bits + 7) / 8;
  std::vector<uint8_t> codes(size(rows * columns)), packed(size(rows * bytes)), back(codes.size()), expected(packed.size());
  for (uint8_t& code : codes) code = static_cast<uint8_t>(drawn() >> 24 & ((1u << bits) - 1));
  for (int64_t row = 0; row < rows; row++)
    for (int64_t bit = 0; bit < columns * bits; bit++)
      if (codes[size(row * columns + bit / bits)] >> bit % bits & 1)
        expected[size(row * bytes + bit / 8)] |= static_cast<uint8_t>(1 << bit % 8);
  expect(!fewbit_pack_fields(codes.data(), rows, columns, bits, packed.data()) && packed == expected, "pack_fields", columns, bits);
  expect(!fewbit_unpack_fields(packed.data(), rows, columns, bits, back.data()) && back == codes, "unpack_fields", columns, bits);
}

// Every code is the nearest, under grids that span what is there; and the squares are those of what codes stand for.
void check_rounding(int64_t columns, int64_t block, int32_t levels, int32_t ends, int32_t isa) {
  const int64_t rows = 5, blocks = (columns + block - 1) / block;
  std::vector<float> weight(size(rows * columns)), scale(size(rows * blocks)), offset(scale.size());
  std::vector<uint16_t> stored(scale.size());
  std::vector<uint8_t> codes(weight.size()), zero(scale.size());
  for (float& w : weight) w = static_cast<float>(static_cast<int32_t>(drawn())) * 1e-10f;
  double sums[2], at_once[2];
  fewbit_grid_round_call call = {weight.data(), rows, columns, block, levels, 0, stored.data(), ends ? zero.data() : nullptr,
                                 codes.data(), at_once};
  expect(fewbit_grid_round(&call, isa) == FEWBIT_OK, "grid_round", columns, isa);
  double lost = 0, whole = 0;
  for (int64_t i = 0; i < rows * columns; i++) {
    const size_t at = size(i / columns * blocks + i % columns / block);
    scale[at] = fewbit::from_float16(stored[at]);
    const double s = scale[at], z = ends ? zero[at] : levels / 2, w = weight[size(i)], code = codes[size(i)];
    const double best = fmin(fmax(w / s + z, 0), levels - 1);
    expect(fabs(code - best) <= 0.5 + 1e-3, "nearest code", columns, i);
    expect(fabs(w) <= 1.01 * s * (levels - 1), "range of a grid", columns, i);
    lost += (s * (code - z) - w) * (s * (code - z) - w), whole += w * w;
    offset[at] = static_cast<float>(-s * z);
  }
  fewbit_squares_call told = {weight.data(), scale.data(), offset.data(), nullptr, codes.data(), rows, columns, block, sums};
  expect(fewbit_squares(&told, isa) == FEWBIT_OK, "squares", columns, isa);
  expect(sums[0] == at_once[0] && sums[1] == at_once[1], "squares while rounding", columns, isa);
  expect(fabs(sqrt(sums[0]) - sqrt(lost)) <= 1e-6 * sqrt(whole), "squares lost", columns, isa);
  expect(fabs(sums[1] - whole) <= 1e-5 * whole, "squares of the weight", columns, isa);
}

// What numbers cost, each by the nearest of three centers; or, with none, the numbers first .. last - 1 by their mean.
double cost(const std::vector<float>& x, const std::vector<float>& w, size_t first, size_t last, const double* centers) {
  double mass = 0, sum = 0, total = 0;
  for (size_t i = first; i < last; i++) mass += double(w[i]), sum += double(w[i]) * double(x[i]);
  for (size_t i = first; i < last; i++) {
    double off = fabs(double(x[i]) - sum / mass);
    if (centers) off = fmin(fmin(fabs(double(x[i]) - centers[0]), fabs(double(x[i]) - centers[1])), fabs(double(x[i]) - centers[2]));
    total += double(w[i]) * off * off;
  }
  return total;
}

// Of all ways to cut numbers into three, none costs less.
void check_centers(int64_t numbers, int32_t cells) {
  const size_t n = size(numbers);
  std::vector<float> x(n), w(n);
  float last = -1;
  for (size_t i = 0; i < n; i++) w[i] = 1 + static_cast<float>(drawn()) * 1e-9f, x[i] = last += 0.01f + static_cast<float>(drawn()) * 1e-10f;
  std::vector<double> centers(3);
  fewbit_centers_call call = {x.data(), w.data(), 1, numbers, 3, cells, centers.data()};
  expect(fewbit_centers(&call) == FEWBIT_OK && centers[0] < centers[1] && centers[1] < centers[2], "centers", numbers, cells);
  const double found = cost(x, w, 0, n, centers.data());
  for (size_t i = 1; i < n - 1; i += n / 64 + 1)
    for (size_t j = i + 1; j < n; j += n / 64 + 1) {
      const double other = cost(x, w, 0, i, nullptr) + cost(x, w, i, j, nullptr) + cost(x, w, j, n, nullptr);
      expect(found <= other * (1 + 1e-9), "cuts", numbers, static_cast<int64_t>(i));
    }
  call.size = 2;
  expect(fewbit_centers(&call) == FEWBIT_OK && centers[1] == centers[2], "fewer numbers than centers", numbers, cells);
  call.count = 0;
  expect(fewbit_centers(&call) == FEWBIT_BAD_ARGUMENT, "no centers", numbers, cells);
}

}  // namespace

int grids_failures() {
  for (const int64_t numbers : {4, 7, 31, 64, 1500})
    for (const int32_t cells : {0, 1}) check_centers(numbers, cells);
  for (const int64_t columns : {1, 7, 8, 9, 31, 32, 63, 97, 256}) {
    for (int32_t bits = 1; bits <= 7; bits++) check_fields(columns, bits);
    for (const int32_t isa : {0, -1})
      for (const int64_t block : {columns, int64_t{7}, int64_t{32}}) {
        check_rounding(columns, block, 16, 1, isa);
        check_rounding(columns, block, 256, 0, isa);
      }
  }
  return failures;
}
