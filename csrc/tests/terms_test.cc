// SPDX-License-Identifier: Apache-2.0
// Matrices that are made of others against double precision, on every instruction set of what lies between matrix
// products: a token alone gives the bits that it gives in company. What rounds and splits activations, against its
// definition. Buffers have exactly the size they need.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <random>
#include <vector>

#include "core/dtypes.h"
#include "decode/steps.h"

namespace {

using fewbit::Steps;

typedef std::vector<float> Floats;

int failures = 0;
std::mt19937 generator(23);

void expect(bool good, const char* what, int64_t detail) {
  if (good) return;
  failures++;
  printf("terms: %s, %lld\n", what, static_cast<long long>(detail));
}

Floats random_floats(int64_t count, float width) {
  std::normal_distribution<float> normal(0, width);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// A weight, what it stands for, (rows, columns), and the magnitudes that its errors are relative to.
struct Made {
  fewbit_weight weight = {};
  std::vector<double> value, magnitude;
};

// Makes weights, and keeps what they point to.
struct Maker {
  std::deque<Floats> floats;
  std::deque<std::vector<fewbit_weight>> terms;
  std::deque<std::vector<int32_t>> orders;
  std::deque<std::vector<int64_t>> starts;
  std::deque<std::vector<uint8_t>> bytes;
  std::deque<std::vector<uint16_t>> indices;
  std::deque<fewbit_sparse> entries;

  const float* array(int64_t count) {
    floats.push_back(random_floats(count, 1));
    return floats.back().data();
  }

  static Made empty(int32_t kind, int64_t rows, int64_t columns) {
    Made made;
    made.weight.kind = kind, made.weight.rows = rows, made.weight.columns = columns;
    made.value.resize(static_cast<size_t>(rows * columns)), made.magnitude = made.value;
    return made;
  }

  Made dense(int64_t rows, int64_t columns) {
    Made made = empty(FEWBIT_DENSE, rows, columns);
    const float* values = array(rows * columns);
    made.weight.dense = values;
    for (size_t i = 0; i < made.value.size(); i++)
      made.value[i] = static_cast<double>(values[i]), made.magnitude[i] = fabs(made.value[i]);
    return made;
  }

  // One entry a row.
  Made sparse(int64_t rows, int64_t columns) {
    Made made = empty(FEWBIT_SPARSE, rows, columns);
    const int64_t slices = (rows + 7) / 8;
    starts.emplace_back(), bytes.emplace_back(), indices.emplace_back();
    for (int64_t s = 0; s <= slices; s++) starts.back().push_back(s);
    const float* random = array(8 * slices);
    Floats values(random, random + 8 * slices);
    for (int64_t r = 0; r < 8 * slices; r++) {
      const int64_t column = r * 7 % columns;
      bytes.back().push_back(static_cast<uint8_t>(r % 256));
      indices.back().push_back(static_cast<uint16_t>(r < rows ? column : columns));
      if (r >= rows) values[static_cast<size_t>(r)] = 0;
      else made.value[static_cast<size_t>(r * columns + column)] = static_cast<double>(values[static_cast<size_t>(r)]);
    }
    for (size_t i = 0; i < made.value.size(); i++) made.magnitude[i] = fabs(made.value[i]);
    floats.push_back(values);
    entries.push_back({rows, columns, 2, 0, starts.back().data(), bytes.back().data(), indices.back().data(),
                       floats.back().data()});
    made.weight.isa = FEWBIT_SERIAL, made.weight.sparse = &entries.back();
    return made;
  }

  fewbit_weight& hold(Made* made, const std::vector<Made>& parts) {
    terms.emplace_back();
    for (const Made& part : parts) terms.back().push_back(part.weight);
    made->weight.term = terms.back().data(), made->weight.terms = static_cast<int64_t>(parts.size());
    return made->weight;
  }

  Made sum(const std::vector<Made>& parts, bool by_rows, bool by_columns) {
    const int64_t rows = parts[0].weight.rows, columns = parts[0].weight.columns;
    Made made = empty(FEWBIT_SUM, rows, columns);
    fewbit_weight& w = hold(&made, parts);
    w.row_scale = by_rows ? array(rows) : nullptr, w.column_scale = by_columns ? array(columns) : nullptr;
    for (int64_t i = 0; i < rows * columns; i++) {
      const double factor = (by_rows ? static_cast<double>(w.row_scale[i / columns]) : 1.0) *
                            (by_columns ? static_cast<double>(w.column_scale[i % columns]) : 1.0);
      const size_t at = static_cast<size_t>(i);
      for (const Made& part : parts)
        made.value[at] += factor * part.value[at], made.magnitude[at] += fabs(factor) * part.magnitude[at];
    }
    return made;
  }

  Made product(const Made& right, const Made& left, bool scaled) {
    const int64_t rows = left.weight.rows, columns = right.weight.columns, rank = right.weight.rows;
    Made made = empty(FEWBIT_PRODUCT, rows, columns);
    fewbit_weight& w = hold(&made, {right, left});
    w.middle = scaled ? array(rank) : nullptr;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++)
        for (int64_t k = 0; k < rank; k++) {
          const size_t at = static_cast<size_t>(r * columns + c), l = static_cast<size_t>(r * rank + k);
          const size_t at_right = static_cast<size_t>(k * columns + c);
          const double middle = scaled ? static_cast<double>(w.middle[k]) : 1.0;
          made.value[at] += left.value[l] * middle * right.value[at_right];
          made.magnitude[at] += left.magnitude[l] * fabs(middle) * right.magnitude[at_right];
        }
    return made;
  }

  Made beside(const std::vector<Made>& parts) {
    int64_t columns = 0;
    for (const Made& part : parts) columns += part.weight.columns;
    const int64_t rows = parts[0].weight.rows;
    Made made = empty(FEWBIT_COLUMNS, rows, columns);
    orders.emplace_back();
    for (int32_t k = 0; k < columns; k++) orders.back().push_back(k);
    std::shuffle(orders.back().begin(), orders.back().end(), generator);
    hold(&made, parts).order = orders.back().data();
    int64_t first = 0;
    for (const Made& part : parts) {
      const int64_t wide = part.weight.columns;
      for (int64_t i = 0; i < rows * wide; i++) {
        const int64_t to = i / wide * columns + orders.back()[static_cast<size_t>(first + i % wide)];
        made.value[static_cast<size_t>(to)] = part.value[static_cast<size_t>(i)];
        made.magnitude[static_cast<size_t>(to)] = part.magnitude[static_cast<size_t>(i)];
      }
      first += wide;
    }
    return made;
  }

  // Twice the same matrix, so that it does not matter what is large, but that nothing is lost and nothing counts twice.
  Made outliers(const Made& matrix) {
    Made made = matrix;
    made.weight = empty(FEWBIT_OUTLIERS, matrix.weight.rows, matrix.weight.columns).weight;
    hold(&made, {matrix, matrix}).threshold = 1.5f;
    return made;
  }
};

void check(const Made& made, const Floats& bias, int64_t tokens, int32_t isa) {
  fewbit_weight w = made.weight;
  w.bias = bias.empty() ? w.bias : bias.data();
  const Floats x = random_floats(tokens * w.columns, 1);
  Floats y(static_cast<size_t>(tokens * w.rows), NAN), alone(static_cast<size_t>(w.rows));
  expect(fewbit_weight_multiply(&w, x.data(), tokens, y.data(), isa, 2) == FEWBIT_OK, "status", w.kind);
  for (int64_t t = 0; t < tokens; t++) {
    fewbit_weight_multiply(&w, x.data() + t * w.columns, 1, alone.data(), isa, 1);
    expect(!memcmp(alone.data(), y.data() + t * w.rows, alone.size() * sizeof(float)), "a token alone", w.kind);
    for (int64_t r = 0; r < w.rows; r++) {
      double sum = bias.empty() ? 0.0 : static_cast<double>(bias[static_cast<size_t>(r)]), magnitude = fabs(sum);
      for (int64_t c = 0; c < w.columns; c++) {
        const double value = static_cast<double>(x[static_cast<size_t>(t * w.columns + c)]);
        sum += made.value[static_cast<size_t>(r * w.columns + c)] * value;
        magnitude += made.magnitude[static_cast<size_t>(r * w.columns + c)] * fabs(value);
      }
      // No chain has more than 64 operations.
      const double error = fabs(static_cast<double>(y[static_cast<size_t>(t * w.rows + r)]) - sum);
      expect(error <= 64 * ldexp(1, -24) * magnitude, "result", w.kind);
    }
  }
}

void check_kinds(int32_t isa) {
  Maker m;
  const int64_t rows = 13, columns = 21, rank = 5;
  const auto low_rank = [&](bool scaled) { return m.product(m.dense(rank, columns), m.dense(rows, rank), scaled); };
  const Made scaled = m.sum({m.dense(rows, columns), low_rank(true), m.sparse(rows, columns)}, true, true);
  const Made parts = m.beside({m.dense(rows, 4), m.sparse(rows, 9), m.sum({m.dense(rows, 8)}, true, false)});
  const Made all[] = {m.dense(rows, columns),
                      m.sparse(rows, columns),
                      m.sum({m.dense(rows, columns)}, false, false),
                      low_rank(false),
                      low_rank(true),
                      scaled,
                      parts,
                      m.sum({parts, scaled, m.sum({m.sparse(rows, columns)}, false, true)}, false, true),
                      m.outliers(m.dense(rows, columns)),
                      m.sum({m.dense(rows, columns), m.outliers(m.dense(rows, columns))}, true, false)};
  for (const Made& made : all)
    for (int64_t tokens : {1, 9}) check(made, {}, tokens, isa), check(made, random_floats(rows, 1), tokens, isa);
}

// fewbit_rounding in words of C.
Floats rounded(const fewbit_rounding& r, const Floats& x) {
  Floats out = x;
  const float top = static_cast<float>((1 << r.bits) - 1);
  for (size_t first = 0; first < x.size(); first += static_cast<size_t>(r.block)) {
    const size_t end = std::min(x.size(), first + static_cast<size_t>(r.block));
    float low = 0, high = 0;
    bool nan = false;
    for (size_t i = first; i < end; i++) {
      low = fminf(low, x[i]), high = fmaxf(high, x[i]);
      nan |= !(fabsf(x[i]) < INFINITY);
    }
    const float wide = r.symmetric ? 2 * r.clip * fmaxf(-low, high) : r.clip * high - r.clip * low;
    float scale = fewbit::from_float16(fewbit::to_float16(fminf(fmaxf(wide / top, ldexpf(1, -24)), 65504.0f)));
    float zero = r.symmetric ? ldexpf(1, r.bits - 1) : fminf(nearbyintf(-(r.clip * low) / scale), top);
    if (r.scale != 0) scale = r.scale, zero = static_cast<float>(r.zero);
    for (size_t i = first; i < end; i++)
      out[i] = nan ? NAN : scale * (fminf(fmaxf(nearbyintf(x[i] / scale + zero), 0.0f), top) - zero);
  }
  return out;
}

void check_inputs(const Steps& steps) {
  const fewbit_rounding roundings[] = {{4, 1, 100, 0.9f, 0, 0, 0},    {8, 0, 7, 1, 0, 0, 0},
                                       {2, 0, 100, 0.8f, 0, 0, 0},    {5, 1, 8, 1, 0, 0, 0},
                                       {4, 0, 100, 1, 0.3f, 5, 0},    {8, 0, 100, 1, 0.02f, 255, 0}};
  for (const fewbit_rounding& rounding : roundings)
    for (int64_t count : {1, 31, 97})
      for (float odd : {0.25f, 0.0f, 1e30f, INFINITY, NAN}) {
        Floats x = random_floats(count, 1), out(x.size());
        x.back() = odd;
        const Floats expected = rounded(rounding, x);
        steps.round(rounding, x.data(), count, out.data());
        for (size_t i = 0; i < x.size(); i++)
          expect(out[i] == expected[i] || (out[i] != out[i] && expected[i] != expected[i]), "round", rounding.bits);
      }
  for (int64_t count : {1, 31, 97}) {
    Floats x = random_floats(count, 1), small(x.size()), large(x.size());
    x.back() = NAN;
    bool any = false;
    const bool found = steps.split(x.data(), 1.25f, count, small.data(), large.data());
    for (size_t i = 0; i < x.size(); i++) {
      const bool is_large = fabsf(x[i]) >= 1.25f;
      any |= is_large;
      const float here = is_large ? large[i] : small[i], other = is_large ? small[i] : large[i];
      expect((here == x[i] || (here != here && x[i] != x[i])) && other == 0, "split", count);
    }
    expect(found == any, "split", count);
  }
}

void check_refusals() {
  Maker m;
  const Made sum = m.sum({m.dense(4, 6), m.dense(4, 6)}, false, false), outliers = m.outliers(m.dense(4, 6));
  const Made parts = m.beside({m.dense(4, 2), m.dense(4, 4)}), low = m.product(m.dense(3, 6), m.dense(4, 3), false);
  const std::vector<int32_t> twice = {0, 1, 2, 3, 4, 4}, beyond = {0, 1, 2, 3, 4, 6};
  const fewbit_rounding one_bit = {1, 1, 8, 1, 0, 0, 0};
  std::vector<fewbit_weight> other(sum.weight.term, sum.weight.term + 2);
  other[1].columns = 5;
  fewbit_weight bad[11];
  for (fewbit_weight& w : bad) w = sum.weight;
  bad[0].term = nullptr, bad[1].terms = 0, bad[2].term = other.data(), bad[3].kind = 99;
  bad[4] = parts.weight, bad[4].order = twice.data(), bad[5] = parts.weight, bad[5].order = beyond.data();
  bad[6] = parts.weight, bad[6].order = nullptr, bad[7] = low.weight, bad[7].terms = 1;
  bad[8] = outliers.weight, bad[8].threshold = 0, bad[9] = m.dense(4, 6).weight, bad[9].rounding = &one_bit;
  bad[10] = m.sparse(4, 6).weight, bad[10].sparse = nullptr;
  const Floats x = random_floats(6, 1);
  Floats y(4);
  for (const fewbit_weight& w : bad)
    expect(fewbit_weight_multiply(&w, x.data(), 1, y.data(), FEWBIT_SERIAL, 1) == FEWBIT_BAD_ARGUMENT, "taken",
           &w - bad);
  Made deep = m.dense(4, 6);
  for (int i = 0; i < 9; i++) deep = m.sum({deep}, false, false);
  expect(fewbit_weight_multiply(&deep.weight, x.data(), 1, y.data(), FEWBIT_SERIAL, 1) == FEWBIT_BAD_ARGUMENT, "depth",
         9);
}

}  // namespace

int terms_failures() {
  const int32_t isas[] = {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVX512, FEWBIT_NEON};
  for (const int32_t isa : isas)
    if (const Steps* steps = fewbit::steps_of(isa)) check_kinds(isa), check_inputs(*steps);
  check_refusals();
  printf("terms: %d failures\n", failures);
  return failures;
}
