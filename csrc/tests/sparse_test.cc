// SPDX-License-Identifier: Apache-2.0
// fewbit_sparse_add against float64 within its bound; the same bits on every ISA, at any number of threads and tokens;
// nothing written between the rows of y, and nothing read beyond any array.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "fewbit.h"

namespace {

const int32_t kIsas[] = {FEWBIT_SERIAL,     FEWBIT_AVX2,       FEWBIT_AVX512,        FEWBIT_AVX512VNNI,
                         FEWBIT_AVX512VBMI, FEWBIT_AVX512BF16, FEWBIT_AVX512VPOPCNT, FEWBIT_AVXVNNI,
                         FEWBIT_NEON,       FEWBIT_NEONDOT};

int failures = 0;

struct Shape {
  int64_t rows, columns, tokens;
  double density;
};

// No entry at all, rows without any, whole rows, ragged slices and windows, columns past those of 16 bits.
const Shape kShapes[] = {{1, 1, 1, 1},       {1, 7, 2, 0},       {7, 31, 3, 0.3},      {8, 33, 4, 1},
                         {31, 97, 8, 0.05},  {255, 65, 9, 0.1},  {256, 512, 1, 0.02},  {257, 513, 11, 0.02},
                         {9, 65535, 2, 1e-3}, {9, 65536, 5, 1e-3}, {530, 1024, 17, 0.03}, {1200, 700, 1, 0.1}};

struct Entry {
  int64_t column;
  float value;
};

// The entries of each row, and the same in slice8. Every array begins at an address as odd as its type allows.
struct Case {
  Shape s;
  bool wide, half;
  std::vector<std::vector<Entry>> entries;
  std::vector<int64_t> start;
  std::vector<uint8_t> order;
  std::vector<uint16_t> narrow{0}, halves{0};
  std::vector<int32_t> index{0};
  std::vector<float> floats{0};
  fewbit_sparse matrix;

  Case(const Shape& shape, bool wide_index, bool half_values, std::mt19937& random)
      : s(shape), wide(wide_index || shape.columns > 65535), half(half_values), entries(shape.rows) {
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<double> uniform;
    for (auto& row : entries)
      for (int64_t k = s.density == 1 || random() % 8 ? 0 : s.columns; k < s.columns; k++)
        if (uniform(random) < s.density)
          row.push_back({k, half ? static_cast<float>(static_cast<int>(random() % 4097) - 2048) / 1024 : normal(random)});
    pack();
    matrix = {s.rows, s.columns, wide ? 4 : 2, half, start.data(), order.data(), nullptr, nullptr};
    matrix.index = wide ? static_cast<const void*>(&index[1]) : &narrow[1];
    matrix.value = half ? static_cast<const void*>(&halves[1]) : &floats[1];
  }

  void put(int64_t column, float value) {
    if (wide) index.push_back(static_cast<int32_t>(column));
    else narrow.push_back(static_cast<uint16_t>(column));
    if (!half) return floats.push_back(value);
    const int exponent = value == 0 ? -15 : std::max(ilogbf(value), -14);
    const auto digits = static_cast<int>(value == 0 ? 0 : ldexpf(fabsf(value), 10 - exponent));
    halves.push_back(static_cast<uint16_t>((signbit(value) ? 0x8000 : 0) + (value == 0 ? 0 : (exponent + 14) * 1024 + digits)));
  }

  void pack() {
    start.push_back(0);
    for (int64_t first = 0; first < s.rows; first += 256) {
      std::vector<int64_t> rows(std::min<int64_t>(256, s.rows - first));
      std::iota(rows.begin(), rows.end(), 0);
      std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) {
        return entries[first + a].size() > entries[first + b].size();
      });
      while (rows.size() % 8) rows.push_back(255);
      for (size_t i = 0; i < rows.size(); i += 8) {
        const size_t steps = entries[first + rows[i]].size();
        for (size_t k = 0; k < steps; k++)
          for (size_t lane = i; lane < i + 8; lane++) {
            const int64_t row = first + rows[lane];
            if (row < s.rows && k < entries[row].size()) put(entries[row][k].column, entries[row][k].value);
            else put(s.columns, 0);
          }
        start.push_back(start.back() + static_cast<int64_t>(steps));
      }
      for (const int64_t row : rows) order.push_back(static_cast<uint8_t>(row));
    }
  }

  void fail(const char* what, double found, double allowed) const {
    failures++;
    printf("FAILED sparse rows %lld columns %lld tokens %lld wide %d half %d: %s %g, allowed %g\n",
           static_cast<long long>(s.rows), static_cast<long long>(s.columns), static_cast<long long>(s.tokens), wide, half,
           what, found, allowed);
  }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) { return !memcmp(a.data(), b.data(), a.size() * 4); }

// x of one dtype, tokens and columns apart; y with a gap of 2 between tokens.
void check(const Case& c, int32_t dtype, int64_t step, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const Shape& s = c.s;
  const int64_t stride = (s.columns + 3) * step, gap = s.rows + 2;
  std::vector<float> wide_x(s.tokens * stride + 1), plain(s.tokens * s.columns);
  std::vector<uint16_t> narrow_x(s.tokens * stride + 1);
  for (int64_t t = 0; t < s.tokens; t++)
    for (int64_t k = 0; k < s.columns; k++) {
      const int64_t at = t * stride + k * step + 1;
      float& x = plain[t * s.columns + k];
      x = dtype == FEWBIT_FLOAT32 ? normal(random) : 1 + static_cast<float>(random() % 128) / 128;
      wide_x[at] = x;  // 1.m: 7 bits of m are those of a bfloat16, and the upper ones of a float16
      const auto digits = static_cast<uint16_t>((x - 1) * 128);
      narrow_x[at] = static_cast<uint16_t>(dtype == FEWBIT_BFLOAT16 ? 0x3f80 + digits : 0x3c00 + digits * 8);
    }
  const void* data = dtype == FEWBIT_FLOAT32 ? static_cast<const void*>(&wide_x[1]) : &narrow_x[1];
  std::vector<float> before((s.tokens - 1) * gap + s.rows + 1), first;
  for (float& y : before) y = normal(random);
  for (const int32_t isa : kIsas) {
    if (!(fewbit_caps() & isa)) continue;
    for (int32_t threads = 1; threads <= 3; threads++) {
      std::vector<float> y = before;
      const fewbit_input x = {data, s.tokens, stride, step, dtype};
      const int code = fewbit_sparse_add(&c.matrix, &x, &y[1], gap, isa, threads);
      if (code != FEWBIT_OK) return c.fail("status", code, 0);
      if (first.empty()) first = y;
      if (!same(first, y)) return c.fail("other bits on isa", isa, 0);
    }
    std::vector<float> y = before;  // one token a call
    for (int64_t t = 0; t < s.tokens; t++) {
      const fewbit_input x = {plain.data() + t * s.columns, 1, 0, 1, FEWBIT_FLOAT32};
      fewbit_sparse_add(&c.matrix, &x, &y[1 + t * gap], 0, isa, 1);
    }
    if (!same(first, y)) return c.fail("other bits alone on isa", isa, 0);
  }
  for (int64_t t = 0; t < s.tokens; t++)
    for (int64_t r = 0; r < gap && 1 + t * gap + r < static_cast<int64_t>(before.size()); r++) {
      double answer = before[1 + t * gap + r], size = 0;
      if (r < s.rows)
        for (const Entry& e : c.entries[r]) {
          const double product = static_cast<double>(e.value) * plain[t * s.columns + e.column];
          answer += product, size += fabs(product);
        }
      const double operations = r < s.rows ? static_cast<double>(c.entries[r].size()) + 2 : 0;
      const double error = fabs(first[1 + t * gap + r] - answer);
      const double bound = ldexp(operations * size + (size > 0 ? fabs(answer) : 0), -24);
      if (!(error <= bound)) return c.fail("error", error, bound);
    }
}

// Infinity and NaN reach the rows that have an entry in their column, and no padding carries them elsewhere.
void check_poison(std::mt19937& random) {
  const Case c({300, 40, 9, 0.1}, false, true, random);
  for (const int64_t tokens : {1, 9})
    for (const int32_t isa : kIsas) {
      if (!(fewbit_caps() & isa)) continue;
      std::vector<float> x(tokens * 40, 1), y(tokens * 300, 0);
      for (int64_t t = 0; t < tokens; t++) x[t * 40] = INFINITY, x[t * 40 + 39] = NAN;
      const fewbit_input input = {x.data(), tokens, 40, 1, FEWBIT_FLOAT32};
      fewbit_sparse_add(&c.matrix, &input, y.data(), 300, isa, 1);
      for (int64_t i = 0; i < tokens * 300; i++) {
        bool touched = false;
        for (const Entry& e : c.entries[i % 300]) touched |= e.column == 0 || e.column == 39;
        if (touched == isfinite(y[i])) return c.fail("poison", y[i], touched);
      }
    }
}

void check_refusals(std::mt19937& random) {
  const Case c({20, 40, 1, 0.2}, false, true, random);
  std::vector<float> data(40, 1), y(20);
  const fewbit_input x = {data.data(), 1, 40, 1, FEWBIT_FLOAT32};
  fewbit_sparse bad[8];
  for (auto& matrix : bad) matrix = c.matrix;
  std::vector<int64_t> falling = c.start, late = c.start;
  falling[1] = falling[2] + 1, late[0] = 1;
  bad[0].rows = 0, bad[1].columns = 0, bad[2].columns = 65536, bad[3].index_bytes = 3, bad[4].start = falling.data();
  bad[5].start = late.data(), bad[6].index = nullptr, bad[7].value = nullptr;
  for (const auto& matrix : bad)
    if (fewbit_sparse_add(&matrix, &x, y.data(), 20, FEWBIT_SERIAL, 1) != FEWBIT_BAD_ARGUMENT) c.fail("taken", 1, 0);
  fewbit_input two = x, typed = x;
  two.tokens = 2, typed.dtype = 3;
  const int refused[] = {fewbit_sparse_add(nullptr, &x, y.data(), 20, FEWBIT_SERIAL, 1),
                         fewbit_sparse_add(&c.matrix, nullptr, y.data(), 20, FEWBIT_SERIAL, 1),
                         fewbit_sparse_add(&c.matrix, &x, nullptr, 20, FEWBIT_SERIAL, 1),
                         fewbit_sparse_add(&c.matrix, &two, y.data(), 19, FEWBIT_SERIAL, 1),
                         fewbit_sparse_add(&c.matrix, &typed, y.data(), 20, FEWBIT_SERIAL, 1),
                         fewbit_sparse_add(&c.matrix, &x, y.data(), 20, FEWBIT_SERIAL, 0)};
  for (const int code : refused)
    if (code != FEWBIT_BAD_ARGUMENT) c.fail("status", code, FEWBIT_BAD_ARGUMENT);
  const int32_t absent = FEWBIT_NEONDOT & ~fewbit_caps() ? FEWBIT_NEONDOT : FEWBIT_AVX2;
  if (fewbit_sparse_add(&c.matrix, &x, y.data(), 20, absent, 1) != FEWBIT_NO_KERNEL) c.fail("isa", absent, 0);
  for (const float value : y)
    if (value != 0) c.fail("written", value, 0);
}

}  // namespace

int sparse_failures() {
  std::mt19937 random(5);
  int at = 0;
  for (const Shape& shape : kShapes)
    for (int kind = 0; kind < 4; kind++, at++) {
      const Case c(shape, kind & 1, kind & 2, random);
      for (const int32_t dtype : {FEWBIT_FLOAT32, FEWBIT_BFLOAT16, FEWBIT_FLOAT16}) check(c, dtype, 1 + at % 2, random);
    }
  check_poison(random);
  check_refusals(random);
  if (fewbit_caps() & FEWBIT_AVX2) printf("sparse on avx2\n");
  if (fewbit_caps() & FEWBIT_NEON) printf("sparse on neon\n");
  printf("sparse: %d failures\n", failures);
  return failures;
}
