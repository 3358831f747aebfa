// SPDX-License-Identifier: Apache-2.0
// FEWBIT_BFLOAT16S against float64 arithmetic, on a machine that multiplies bfloat16; the bits must be the same at any
// number of threads and tokens.
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

// Whole rows, blocks that divide a segment or not, ragged ends, more tokens than are laid out at a time.
const Shape kShapes[] = {
    {1, 1, 1, 1}, {7, 31, 31, 3}, {40, 800, 96, 1}, {33, 530, 530, 2}, {33, 97, 32, 9}, {80, 256, 64, 8}, {17, 800, 96, 70}, {65, 530, 530, 17}, {40, 1056, 352, 33},
};

int failures = 0;

void fail(const Shape& s, int32_t bits, float zero, const char* what, double found, double allowed) {
  failures++;
  printf("FAILED bfloat16 bits %d zero %g rows %lld columns %lld block %lld tokens %lld: %s %g, allowed %g\n", bits, zero,
         static_cast<long long>(s.rows), static_cast<long long>(s.columns), static_cast<long long>(s.block),
         static_cast<long long>(s.tokens), what, found, allowed);
}

uint16_t bfloat16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

double value_of(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

int multiply(const fewbit_matrix& matrix, const uint16_t* x, int64_t tokens, const float* bias, float* y, int threads) {
  const fewbit_output output = {&matrix, bias, y, matrix.rows};
  const fewbit_input input = {x, tokens, 2 * matrix.columns, 2, FEWBIT_BFLOAT16};  // every other element
  return fewbit_linear_many(&output, 1, &input, FEWBIT_BFLOAT16S, FEWBIT_FLOAT32, FEWBIT_AVX512BF16, threads);
}

void check(const Shape& s, int32_t bits, float zero, bool has_offset, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int64_t tiles = (s.rows + 15) / 16, blocks = (s.columns + s.block - 1) / s.block;
  std::vector<uint8_t> codes(s.rows * s.columns), packed(fewbit_tile16_bytes(s.rows, s.columns, bits));
  for (auto& code : codes) code = random() & ((1u << bits) - 1);
  fewbit_tile16_pack(codes.data(), s.columns, s.rows, s.columns, bits, packed.data());
  std::vector<float> scale(tiles * blocks * 16), offset(scale.size()), bias(s.rows);
  std::vector<uint16_t> x(2 * s.tokens * s.columns);
  for (auto& value : scale) value = normal(random);
  for (auto& value : offset) value = normal(random);
  for (auto& value : bias) value = normal(random);
  for (auto& value : x) value = bfloat16_of(normal(random) * static_cast<float>(random() % 100));
  const fewbit_matrix matrix = {s.rows, s.columns, s.block, bits, FEWBIT_AFFINE, 0, 0, zero, packed.data(), scale.data(),
                                has_offset ? offset.data() : nullptr, nullptr};
  std::vector<float> y(s.tokens * s.rows, NAN), twin(y);
  const int code = multiply(matrix, x.data(), s.tokens, bias.data(), y.data(), 1);
  if (code != FEWBIT_OK) return fail(s, bits, zero, "status", code, 0);
  for (int64_t t = 0; t < s.tokens; t++)
    for (int64_t r = 0; r < s.rows; r++) {
      double sum = bias[r], magnitude = fabs(sum);
      for (int64_t c = 0; c < s.columns; c++) {
        const int64_t at = (r / 16 * blocks + c / s.block) * 16 + r % 16;
        const double level = codes[r * s.columns + c], o = has_offset ? offset[at] : 0;
        const double input = value_of(x[2 * (t * s.columns + c)]);
        sum += (scale[at] * (level - zero) + o) * input;
        magnitude += (fabs(scale[at]) * (level + zero) + fabs(o)) * fabs(input);
      }
      const double bound = ldexp(static_cast<double>(s.block + blocks + 6), -24) * magnitude;
      const double error = fabs(y[t * s.rows + r] - sum);
      if (!(error <= bound)) return fail(s, bits, zero, "error", error, bound);
    }
  multiply(matrix, x.data(), s.tokens, bias.data(), twin.data(), 2);
  if (memcmp(y.data(), twin.data(), y.size() * sizeof(float))) fail(s, bits, zero, "two threads differ", 1, 0);
  // Again as the last of fewer.
  const int64_t few = s.tokens > 2 ? 3 : 1;
  std::vector<float> last(few * s.rows);
  multiply(matrix, x.data() + 2 * (s.tokens - few) * s.columns, few, bias.data(), last.data(), 1);
  if (memcmp(y.data() + (s.tokens - 1) * s.rows, last.data() + (few - 1) * s.rows, s.rows * sizeof(float)))
    fail(s, bits, zero, "token among fewer differs", 1, 0);
}

void check_refusals() {
  uint8_t codes[64] = {};
  float values[64] = {};
  uint16_t x[64] = {};
  fewbit_matrix matrix = {1, 48, 16, 1, FEWBIT_AFFINE, 0, 0, 0, codes, values, nullptr, nullptr};
  fewbit_input input = {x, 1, 48, 1, FEWBIT_BFLOAT16};
  const fewbit_output output = {&matrix, nullptr, values, 1};
  const auto call = [&](int32_t isa) {
    return fewbit_linear_many(&output, 1, &input, FEWBIT_BFLOAT16S, FEWBIT_FLOAT32, isa, 1);
  };
  if (call(FEWBIT_AVX512BF16) != FEWBIT_BAD_ARGUMENT) failures++;  // blocks of half a chunk
  matrix.block = 48;
  if (call(FEWBIT_SERIAL) != FEWBIT_NO_KERNEL) failures++;
  input.dtype = FEWBIT_FLOAT16;
  if (call(FEWBIT_AVX512BF16) != FEWBIT_BAD_ARGUMENT) failures++;
  input.dtype = FEWBIT_BFLOAT16, matrix.family = FEWBIT_LUT, matrix.table = values;
  if (call(FEWBIT_AVX512BF16) != FEWBIT_BAD_ARGUMENT) failures++;
}

}  // namespace

int bfloat16_failures() {
  std::mt19937 random(5);
  check_refusals();
  if (fewbit_caps() & FEWBIT_AVX512BF16)
    for (const Shape& s : kShapes)
      for (int32_t bits = 1; bits <= 8; bits++) {
        const float top = static_cast<float>((1 << bits) - 1);
        // No centre, the middle, one that needs halves, and one past which codes would need 9 bits.
        for (const float zero : {0.0f, top / 2 + 0.5f, top / 2, 0.5f, 300.0f}) check(s, bits, zero, bits % 2, random);
      }
  printf("bfloat16: %d failures\n", failures);
  return failures;
}
