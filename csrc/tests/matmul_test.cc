// SPDX-License-Identifier: Apache-2.0
// fewbit_int8_matmul against 64-bit integers, bit for bit on every ISA, in every memory order and at any number of threads;
// from buffers of exactly the size they need.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "fewbit.h"
#include "fewbit_matmul.h"

namespace {

const int32_t kIsas[] = {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVX512, FEWBIT_NEON};
const char* const kNames[] = {"serial", "avx2", "avx512", "neon"};

int failures = 0;

struct Shape {
  int64_t outer, middle, rows, inner, columns;
};

// Odd sizes, windows of attention, more rows than a unit, and more than one thread.
const Shape kShapes[] = {{1, 1, 1, 1, 1},     {2, 3, 7, 31, 33},   {1, 2, 64, 10, 64}, {2, 1, 64, 64, 10},
                         {1, 1, 97, 33, 7},   {1, 1, 300, 2, 65},  {3, 2, 5, 97, 31},  {1, 1, 2, 1000, 3},
                         {1, 3, 33, 40, 129}};

constexpr int64_t kNone = INT64_MAX;  // the code of what is no number

// (outer, middle, rows, columns), or (outer, middle, columns, rows) in memory.
struct Operand {
  fewbit_operand of;
  std::vector<float> x;
  int64_t rows, columns;

  Operand(const Shape& s, int64_t r, int64_t c, bool transposed, int32_t bits, std::mt19937& random)
      : x(static_cast<size_t>(s.outer * s.middle * r * c)), rows(r), columns(c) {
    const int32_t top = (1 << bits) - 1, zero = static_cast<int32_t>(random() % static_cast<unsigned>(top + 1));
    std::uniform_int_distribution<int> halves(-20, 2 * top + 20);  // between codes and beyond them, too
    of = {nullptr, s.middle * r * c, r * c, transposed ? 1 : c, transposed ? r : 1, 0.0173f, zero, bits};
    for (float& value : x) value = of.scale * (0.5f * static_cast<float>(halves(random)) - static_cast<float>(zero));
    of.data = x.data();
  }
  size_t place(int64_t outer, int64_t middle, int64_t row, int64_t column) const {
    return static_cast<size_t>(outer * of.stride_outer + middle * of.stride_middle + row * of.stride_row +
                               column * of.stride_column);
  }
  std::vector<int64_t> codes() const {
    std::vector<int64_t> all;
    for (const float value : x) {
      const float code = nearbyintf(value / of.scale + static_cast<float>(of.zero));
      const float top = static_cast<float>((1 << of.bits) - 1);
      all.push_back(!isfinite(value) ? kNone : static_cast<int64_t>(code < 0 ? 0 : code > top ? top : code) - of.zero);
    }
    return all;
  }
};

std::vector<float> answer(const Shape& s, const Operand& a, const Operand& b) {
  const std::vector<int64_t> left = a.codes(), right = b.codes();
  std::vector<float> y;
  for (int64_t o = 0; o < s.outer; o++)
    for (int64_t m = 0; m < s.middle; m++)
      for (int64_t r = 0; r < s.rows; r++)
        for (int64_t c = 0; c < s.columns; c++) {
          int64_t sum = 0;
          bool finite = true;
          for (int64_t k = 0; k < s.inner; k++) {
            const int64_t i = left[a.place(o, m, r, k)], j = right[b.place(o, m, k, c)];
            finite = finite && i != kNone && j != kNone;
            if (finite) sum += i * j;
          }
          y.push_back(finite ? a.of.scale * b.of.scale * static_cast<float>(sum) : NAN);
        }
  return y;
}

void check(const Shape& s, const Operand& a, const Operand& b, const char* what) {
  const std::vector<float> expected = answer(s, a, b);
  for (const int32_t isa : kIsas) {
    if (!(fewbit_caps() & isa)) continue;
    for (const int32_t threads : {1, 2}) {
      std::vector<float> y(expected.size(), -1);
      const int status = fewbit_int8_matmul(&a.of, &b.of, s.outer, s.middle, s.rows, s.inner, s.columns, y.data(), isa, threads);
      bool same = status == FEWBIT_OK;
      for (size_t i = 0; i < y.size(); i++) same = same && (isnan(expected[i]) ? isnan(y[i]) : y[i] == expected[i]);
      if (!same)
        failures++, printf("FAILED matmul %s: isa %d, %lld x %lld x %lld\n", what, isa, static_cast<long long>(s.rows),
                           static_cast<long long>(s.inner), static_cast<long long>(s.columns));
    }
  }
}

}  // namespace

int matmul_failures() {
  std::mt19937 random(7);
  for (const Shape& s : kShapes)
    for (const int32_t bits : {8, 4, 1})
      for (const int order : {0, 1, 2, 3}) {
        Operand a(s, s.rows, s.inner, order & 1, bits, random), b(s, s.inner, s.columns, order & 2, 8, random);
        check(s, a, b, "of numbers");
        a.x[a.place(0, 0, s.rows - 1, s.inner - 1)] = INFINITY;
        b.x[b.place(s.outer - 1, s.middle - 1, s.inner / 2, s.columns - 1)] = NAN;
        check(s, a, b, "with NaN");
      }
  for (size_t i = 0; i < sizeof kIsas / sizeof *kIsas; i++)
    if (fewbit_caps() & kIsas[i]) printf("matmul on %s\n", kNames[i]);
  return failures;
}
