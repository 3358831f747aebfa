// SPDX-License-Identifier: Apache-2.0
// Activations on one grid for all tokens, whose zero may be any code: against float64 arithmetic on their codes, on every ISA that
// this machine can run; the bits must be the same on all of them, and of a token in any company.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "fewbit.h"

namespace {

struct Shape {
  int64_t rows, columns, block, tokens;
};

// Whole rows that are summed in parts, blocks, ragged ends; few tokens, and more than are prepared at a time.
const Shape kShapes[] = {{1, 1, 1, 3},       {17, 96, 32, 5},   {70, 300, 64, 4},    {33, 97, 97, 9},
                         {129, 1300, 1300, 3}, {48, 520, 128, 8}, {64, 256, 256, 131}, {80, 640, 256, 3}};
const int32_t kIsas[] = {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVXVNNI, FEWBIT_AVX512VNNI, FEWBIT_NEON,
                         FEWBIT_NEONDOT, FEWBIT_NEONI8MM};
constexpr float kStep = 0.125f;  // of the grid: codes are divided by it exactly

int failures = 0;

void fail(const Shape& s, int32_t bits, int32_t zero, int32_t isa, const char* what) {
  failures++;
  printf("FAILED fixed isa %d bits %d zero %d rows %lld columns %lld tokens %lld: %s\n", isa, bits, zero,
         static_cast<long long>(s.rows), static_cast<long long>(s.columns), static_cast<long long>(s.tokens), what);
}

int multiply(const fewbit_matrix& matrix, const float* x, int64_t tokens, int32_t zero, float* y, int32_t isa, int32_t threads) {
  const fewbit_input input = {x, tokens, matrix.columns, 1, FEWBIT_FLOAT32, kStep, zero};
  const fewbit_output output = {&matrix, nullptr, y, matrix.rows};
  return fewbit_linear_many(&output, 1, &input, matrix.columns, FEWBIT_FLOAT32, isa, threads);
}

// Codes near the zero; any; those at both ends, side by side.
int32_t code_of(int kind, int32_t zero, std::mt19937& random) {
  const int32_t any = static_cast<int32_t>(random() % 256), near = zero + static_cast<int32_t>(random() % 41) - 20;
  return kind == 1 ? any : kind == 2 ? (any % 2 ? 255 : 0) : near < 0 ? 0 : near > 255 ? 255 : near;
}

void check(const Shape& s, int32_t bits, int32_t zero, std::mt19937& random) {
  const int64_t tiles = (s.rows + 15) / 16, blocks = (s.columns + s.block - 1) / s.block;
  std::normal_distribution<float> normal;
  std::vector<uint8_t> codes(s.rows * s.columns), packed(fewbit_tile16_bytes(s.rows, s.columns, bits));
  for (auto& code : codes) code = static_cast<uint8_t>(random() & ((1u << bits) - 1));
  fewbit_tile16_pack(codes.data(), s.columns, s.rows, s.columns, bits, packed.data());
  std::vector<float> scale(tiles * blocks * 16), x(s.tokens * s.columns), first;
  for (auto& value : scale) value = normal(random);
  for (size_t i = 0; i < x.size(); i++)
    x[i] = kStep * static_cast<float>(code_of(static_cast<int>(i / s.columns % 3), zero, random) - zero);
  const float middle = bits == 1 ? 0.5f : static_cast<float>(1 << (bits - 1));
  const fewbit_matrix matrix = {s.rows, s.columns, s.block, bits, FEWBIT_AFFINE, 0, 0, middle,
                                packed.data(), scale.data(), nullptr, nullptr};
  for (const int32_t isa : kIsas) {
    if (!(fewbit_caps() & isa)) continue;
    std::vector<float> y(s.tokens * s.rows, NAN), twin(y);
    if (multiply(matrix, x.data(), s.tokens, zero, y.data(), isa, 1) != FEWBIT_OK) return fail(s, bits, zero, isa, "status");
    for (int64_t t = 0; t < s.tokens && first.empty(); t++)  // others have the same bits
      for (int64_t r = 0; r < s.rows; r++) {
        double sum = 0, magnitude = 0;
        for (int64_t c = 0; c < s.columns; c++) {
          const double q = x[t * s.columns + c] + kStep * static_cast<float>(zero - 128);
          const double w = scale[(r / 16 * blocks + c / s.block) * 16 + r % 16] * (codes[r * s.columns + c] - double{middle});
          sum += q * w, magnitude += fabs(q * w);
        }
        const double bound = ldexp(static_cast<double>(2 * ((s.columns + 31) / 32) + 6) * magnitude, -24);
        if (!(fabs(y[t * s.rows + r] - sum) <= bound)) return fail(s, bits, zero, isa, "error");
      }
    if (first.empty()) first = y;
    if (memcmp(first.data(), y.data(), y.size() * sizeof(float))) fail(s, bits, zero, isa, "differs from serial");
    multiply(matrix, x.data(), s.tokens, zero, twin.data(), isa, 2);
    if (memcmp(twin.data(), y.data(), y.size() * sizeof(float))) fail(s, bits, zero, isa, "two threads differ");
    multiply(matrix, x.data() + (s.tokens - 1) * s.columns, 1, zero, twin.data(), isa, 1);
    if (memcmp(twin.data(), y.data() + (s.tokens - 1) * s.rows, s.rows * sizeof(float)))
      fail(s, bits, zero, isa, "a token alone differs");
  }
}

}  // namespace

int fixed_failures() {
  std::mt19937 random(13);
  for (const Shape& shape : kShapes)
    for (const int32_t bits : {1, 3, 4, 8})
      for (const int32_t zero : {0, 77, 128, 255})
        if (bits % 7 == 1 || zero % 255 == 0) check(shape, bits, zero, random);
  printf("fixed: %d failures\n", failures);
  return failures;
}
