// SPDX-License-Identifier: Apache-2.0
// fewbit_linear_xnor against the definition in fewbit.h, in float64, on every ISA that this machine can run; the bits
// must be the same on all of them, at any number of threads and tokens.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "fewbit.h"

namespace {

struct Shape {
  int64_t rows, columns, tokens;
};

// Ragged ends; more than the 31 chunks whose bits a byte counts; more tokens than are prepared at a time.
const Shape kShapes[] = {{1, 1, 1},   {7, 31, 3},    {31, 33, 2},   {33, 97, 5},    {97, 129, 8},   {16, 992, 1},
                         {17, 993, 4}, {80, 1024, 9}, {65, 2113, 2}, {19, 4096, 70}, {3, 65537, 40}, {300, 160, 1}};

const int32_t kIsas[] = {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVX512VPOPCNT, FEWBIT_NEON};
const char* const kNames[] = {"serial", "avx2", "avx512vpopcnt", "neon"};

int failures = 0;

void fail(const Shape& s, int32_t isa, const char* what, double found, double allowed) {
  failures++;
  printf("FAILED xnor isa %d rows %lld columns %lld tokens %lld: %s %g, allowed %g\n", isa,
         static_cast<long long>(s.rows), static_cast<long long>(s.columns), static_cast<long long>(s.tokens), what,
         found, allowed);
}

double half_of(double x) {
  const int exponent = x < ldexp(1, -14) ? -14 : ilogb(x);
  return ldexp(rint(ldexp(x, 10 - exponent)), exponent - 10);
}

double scale_of(const float* x, int64_t columns) {
  double sum = 0;
  for (int64_t k = 0; k < columns; k++) sum += fabs(static_cast<double>(x[k]));
  return half_of(fmin(fmax(static_cast<float>(sum / static_cast<double>(columns)), ldexp(1, -24)), 65504.0));
}

enum Kind { kUsual, kFloatScales, kAllDiffer, kTiny };

// A matrix, its inputs, and what comes out by the definition. Arrays begin at addresses as odd as their type allows.
struct Case {
  Shape s;
  std::vector<uint8_t> codes, packed;
  std::vector<uint16_t> half;
  std::vector<float> scale, x, bias;
  std::vector<double> answer, magnitude;
  bool is_half;

  Case(const Shape& shape, Kind kind, std::mt19937& random) : s(shape), is_half(kind != kFloatScales) {
    std::normal_distribution<float> normal;
    const int64_t tiles = (s.rows + 15) / 16;
    codes.resize(s.rows * s.columns), packed.resize(fewbit_tile16_bytes(s.rows, s.columns, 1) + 1);
    for (auto& code : codes) code = kind == kAllDiffer ? 1 : random() & 1;
    fewbit_tile16_pack(codes.data(), s.columns, s.rows, s.columns, 1, packed.data() + 1);
    scale.assign(tiles * 16 + 1, 0), half.assign(tiles * 16 + 1, 0);
    for (int64_t r = 0; r < s.rows; r++) {
      const int step = static_cast<int>(random() % 1024);
      scale[r + 1] = is_half ? ldexpf(static_cast<float>(1024 + step), -10) : normal(random);
      half[r + 1] = static_cast<uint16_t>(0x3c00 + step);
    }
    bias.resize(s.rows), x.resize(s.tokens * s.columns + 1);
    for (auto& value : bias) value = normal(random);
    for (auto& value : x) value = kind == kAllDiffer ? -3.0f : normal(random);
    // Quotients that float32 rounds to zero, beside those that it does not.
    for (int64_t i = 0; kind == kTiny && i < s.tokens * s.columns; i++)
      x[i + 1] = i % s.columns ? ldexpf(static_cast<float>(random() % 9), -149)
                               : normal(random) * static_cast<float>(s.columns) * 4;
    solve();
  }

  void solve() {
    for (int64_t t = 0; t < s.tokens; t++) {
      const float* token = x.data() + 1 + t * s.columns;
      const auto x_scale = static_cast<float>(scale_of(token, s.columns));
      std::vector<int32_t> sign;
      for (int64_t k = 0; k < s.columns; k++) sign.push_back(token[k] / x_scale > 0 ? 1 : -1);
      for (int64_t r = 0; r < s.rows; r++) {
        int64_t sum = 0;
        for (int64_t k = 0; k < s.columns; k++) sum += codes[r * s.columns + k] ? sign[k] : -sign[k];
        const double product = static_cast<double>(scale[r + 1]) / 2 * x_scale * static_cast<double>(sum);
        answer.push_back(product + bias[r]), magnitude.push_back(fabs(product) + fabs(bias[r]));
      }
    }
  }

  fewbit_matrix matrix() const {
    const void* scales = is_half ? static_cast<const void*>(half.data() + 1) : scale.data() + 1;
    return {s.rows, s.columns, s.columns, 1, FEWBIT_AFFINE, is_half, 0, 0.5f, packed.data() + 1, scales, nullptr,
            nullptr};
  }
};

double check(const Case& c) {
  const Shape& s = c.s;
  const fewbit_matrix matrix = c.matrix();
  std::vector<float> first;
  double worst = 0;
  const auto run = [&](int64_t token, int64_t tokens, std::vector<float>& y, int32_t isa, int32_t threads) {
    return fewbit_linear_xnor(&matrix, c.x.data() + 1 + token * s.columns, s.columns, tokens, c.bias.data(),
                              y.data() + 1, s.rows, isa, threads);
  };
  for (const int32_t isa : kIsas) {
    if (!(fewbit_caps() & isa)) continue;
    std::vector<float> y(s.tokens * s.rows + 1, 7.0f), twin(y), single(s.rows + 1);
    const int code = run(0, s.tokens, y, isa, 1);
    if (code != FEWBIT_OK) fail(s, isa, "status", code, 0);
    for (size_t i = 0; i < c.answer.size(); i++) {
      const double bound = ldexp(3, -24) * c.magnitude[i], error = fabs(y[i + 1] - c.answer[i]);
      if (!(error <= bound)) return fail(s, isa, "error", error, bound), 1;
      if (bound > 0) worst = fmax(worst, error / bound);
    }
    if (first.empty()) first = y;
    if (memcmp(first.data(), y.data(), y.size() * sizeof(float))) fail(s, isa, "differs from serial", 1, 0);
    run(0, s.tokens, twin, isa, 2);
    if (memcmp(y.data(), twin.data(), y.size() * sizeof(float))) fail(s, isa, "two threads differ", 1, 0);
    for (int64_t t = 0; t < s.tokens; t += 7) {
      run(t, 1, single, isa, 1);
      if (memcmp(y.data() + 1 + t * s.rows, single.data() + 1, s.rows * sizeof(float)))
        fail(s, isa, "token alone differs", static_cast<double>(t), 0);
    }
  }
  return worst;
}

// As many columns as the contract allows, all signs different but one, and no column more. A mean in float32 would lose
// the many small inputs beside the few large ones.
void check_most_columns() {
  const Shape s = {1, 1 << 24, 1};
  const std::vector<float> scale(16, 2.0f);
  std::vector<float> x(s.columns + 1, -ldexpf(1, -8));
  for (int k = 0; k < 16; k++) x[k] = -ldexpf(1, 20);
  const auto expected = static_cast<float>(-16777214 * (1 + ldexp(1, -8)));
  std::vector<uint8_t> packed(fewbit_tile16_bytes(1, s.columns + 1, 1), 255);
  packed[0] = 254;
  fewbit_matrix matrix = {1, s.columns, s.columns, 1, FEWBIT_AFFINE, 0, 0, 0.5f, packed.data(), scale.data(), nullptr,
                          nullptr};
  float y = 0;
  for (const int32_t isa : kIsas) {
    if (!(fewbit_caps() & isa)) continue;
    const int code = fewbit_linear_xnor(&matrix, x.data(), s.columns, 1, nullptr, &y, 1, isa, 1);
    if (code != FEWBIT_OK || y != expected) fail(s, isa, "sum of all columns", y, expected);
  }
  matrix.columns = matrix.block = s.columns + 1;
  if (fewbit_linear_xnor(&matrix, x.data(), 0, 1, nullptr, &y, 1, FEWBIT_SERIAL, 1) != FEWBIT_BAD_ARGUMENT)
    fail(s, FEWBIT_SERIAL, "a column too many was taken", 1, 0);
}

void check_refusals() {
  const std::vector<uint8_t> codes(2 * 64);
  std::vector<float> values(64), y(16);
  const fewbit_matrix good = {1, 48, 48, 1, FEWBIT_AFFINE, 0, 0, 0.5f, codes.data(), values.data(), nullptr, nullptr};
  const auto call = [&](fewbit_matrix matrix, int32_t isa = FEWBIT_SERIAL) {
    return fewbit_linear_xnor(&matrix, values.data(), 48, 1, nullptr, y.data(), 1, isa, 1);
  };
  fewbit_matrix bad[7] = {good, good, good, good, good, good, good};
  bad[0].bits = 2, bad[1].block = 32, bad[2].zero = 0, bad[3].offset = values.data(), bad[4].scale = nullptr;
  bad[5].family = FEWBIT_LUT, bad[5].table = values.data(), bad[6].arranged = 1;
  if (call(good) != FEWBIT_OK || call(good, FEWBIT_NEONDOT) != FEWBIT_NO_KERNEL) failures++;
  for (const auto& matrix : bad)
    if (call(matrix) != FEWBIT_BAD_ARGUMENT) failures++;
}

// A token with NaN gives NaN and nothing else does; infinity counts as its sign, at the largest scale.
void check_poison() {
  const std::vector<uint8_t> codes(64, 255);
  const std::vector<float> scale(16, 2.0f);
  const fewbit_matrix matrix = {16, 32, 32, 1, FEWBIT_AFFINE, 0, 0, 0.5f, codes.data(), scale.data(), nullptr, nullptr};
  for (const int32_t isa : kIsas)
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      if (!(fewbit_caps() & isa)) continue;
      std::vector<float> x(3 * 32, 1.0f), y(3 * 16);
      x[32 + 5] = bad;
      fewbit_linear_xnor(&matrix, x.data(), 32, 3, nullptr, y.data(), 16, isa, 1);
      for (int i = 0; i < 48; i++) {
        const float expected = i / 16 != 1 ? 32.0f : 65504.0f * (bad > 0 ? 32 : 30);
        if (i / 16 == 1 && isnan(bad) ? !isnan(y[i]) : y[i] != expected)
          fail({16, 32, 3}, isa, "poison", y[i], expected);
      }
    }
}

}  // namespace

int xnor_failures() {
  std::mt19937 random(3);
  double worst = 0;
  for (const Shape& shape : kShapes)
    for (const Kind kind : {kUsual, kFloatScales, kAllDiffer, kTiny})
      worst = fmax(worst, check(Case(shape, kind, random)));
  check_most_columns();
  check_refusals();
  check_poison();
  for (int i = 0; i < 4; i++)
    if (fewbit_caps() & kIsas[i]) printf("xnor on %s\n", kNames[i]);
  printf("xnor: at most %.2f of the bound\n", worst);
  return failures;
}
