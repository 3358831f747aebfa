// SPDX-License-Identifier: Apache-2.0
// fewbit_row_linear, fewbit_row_linear_int8 and fewbit_row_decode against float64 arithmetic on codes packed here by the
// definition in fewbit.h; the bits must be the same at any number of threads and tokens, those of integers on every ISA.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "fewbit.h"

namespace {

struct Shape {
  int64_t rows, columns, chunks_a_block, table_rows, tokens;  // chunks_a_block 0: whole rows
};

const Shape kShapes[] = {{1, 1, 0, 1, 1},   {7, 31, 0, 1, 3},    {33, 97, 0, 3, 5},   {65, 512, 1, 1, 4},
                         {40, 700, 2, 5, 9}, {37, 512, 3, 16, 70}, {3, 384, 1, 7, 2}, {6, 4500, 5, 1, 9}};
const int32_t kBits[] = {1, 2, 3, 4, 6, 8};
const int32_t kIsas[] = {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVX512, FEWBIT_NEON};

int failures = 0;

void fail(const Shape& s, int32_t bits, int32_t isa, const char* what) {
  failures++;
  printf("FAILED rows isa %d bits %d rows %lld columns %lld tokens %lld: %s\n", isa, bits, static_cast<long long>(s.rows),
         static_cast<long long>(s.columns), static_cast<long long>(s.tokens), what);
}

// Levels of 8 bits, and activations that int8 holds exactly, the least of them too: whole numbers, and -127.5, which becomes
// -128. One is 127, so that a scale of half a step less than 1 is float16's 1.
// The same codes in rowhalves16 give the same bits, on the instruction set that takes them, and the same weights.
void check_halves(const Shape& s, const fewbit_row_levels& matrix, const fewbit_input& x, const fewbit_input& last,
                  const std::vector<uint8_t>& packed, const float* bias, const std::vector<float>& y) {
  std::vector<uint8_t> moved = packed;
  fewbit_rowhalves16(s.rows, s.columns, 0, moved.data());
  fewbit_row_levels halves = matrix;
  halves.codes = moved.data(), halves.halves = 1;
  std::vector<float> found(y.size(), NAN);
  const auto call = [&](const fewbit_input& input, int32_t isa) {
    return fewbit_row_linear_int8(&halves, &input, bias, found.data(), s.rows, FEWBIT_FLOAT32, isa, 1);
  };
  if (call(x, FEWBIT_SERIAL) != FEWBIT_NO_KERNEL) fail(s, 3, FEWBIT_SERIAL, "takes halves");
  if (call(x, FEWBIT_AVX2) != FEWBIT_OK || memcmp(y.data(), found.data(), y.size() * sizeof(float)))
    fail(s, 3, FEWBIT_AVX2, "halves differ");
  call(last, FEWBIT_AVX2);
  if (memcmp(y.data() + (s.tokens - 1) * s.rows, found.data(), s.rows * sizeof(float)))
    fail(s, 3, FEWBIT_AVX2, "halves of a token alone differ");
  fewbit_rowhalves16(s.rows, s.columns, 1, moved.data());
  if (moved != packed) fail(s, 3, FEWBIT_AVX2, "halves and back");
}

void check_int8(const Shape& s, int32_t bits, const std::vector<uint8_t>& packed, const std::vector<uint8_t>& codes,
                std::vector<float> x, const std::vector<float>& bias, std::mt19937& random) {
  const int64_t tables = (s.rows + s.table_rows - 1) / s.table_rows;
  std::vector<uint8_t> level(tables * 16);
  for (int64_t i = 0; i < tables * 16; i++) {
    const int64_t from = i / 16 * 16 + i % 16 % (1 << bits);
    level[i] = i == from ? static_cast<uint8_t>(1 + random() % 255) : level[from];
    if (random() % 5 == 0 && i == from) level[i] = random() % 2 ? 255 : 1;
  }
  std::vector<float> factor(s.rows);
  for (auto& value : factor) value = ldexpf(1, static_cast<int>(random() % 9) - 4);
  const bool many = (bits + s.rows) % 2;  // pairs of large ones
  const int32_t most = many ? 127 : 60, one_of = many ? 9 : 60;
  for (auto& value : x)
    value = random() % one_of ? static_cast<float>(static_cast<int32_t>(random() % (2 * most + 1)) - most) : -127.5f;
  for (int64_t t = 0; t < s.tokens; t++) x[t * s.columns] = 127.5f;  // becomes 127: 2 * 127.5 / 255 is 1
  const fewbit_row_levels matrix = {s.rows, s.columns, s.table_rows, bits, packed.data(), level.data(), factor.data()};
  const fewbit_input input = {x.data(), s.tokens, s.columns, 1, FEWBIT_FLOAT32};
  const fewbit_input last = {x.data() + (s.tokens - 1) * s.columns, 1, s.columns, 1, FEWBIT_FLOAT32};
  std::vector<float> first;
  for (const int32_t isa : {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVXVNNI, FEWBIT_AVX512VNNI, FEWBIT_NEONDOT}) {
    if (!(fewbit_caps() & isa)) continue;
    std::vector<float> y(s.tokens * s.rows, NAN), twin(y);
    const int code = fewbit_row_linear_int8(&matrix, &input, bias.data(), y.data(), s.rows, FEWBIT_FLOAT32, isa, 1);
    if (code != FEWBIT_OK) return fail(s, bits, isa, "status of integers");
    for (int64_t t = 0; t < s.tokens && first.empty(); t++)  // others have the same bits
      for (int64_t r = 0; r < s.rows; r++) {
        double sum = 0, magnitude = 0;
        for (int64_t c = 0; c < s.columns; c++) {
          const double q = c ? floor(x[t * s.columns + c]) : 127;
          sum += q * (level[r / s.table_rows * 16 + codes[r * s.columns + c]] - 128);
          magnitude += fabs(q) * 256;
        }
        const double bound = ldexp(6 * (magnitude * factor[r] + fabs(bias[r])), -24);
        if (!(fabs(y[t * s.rows + r] - (sum * factor[r] + bias[r])) <= bound)) return fail(s, bits, isa, "integers");
      }
    if (first.empty()) first = y;
    if (memcmp(first.data(), y.data(), y.size() * sizeof(float))) fail(s, bits, isa, "integers differ from serial");
    if (isa == FEWBIT_AVX2 && bits == 3) check_halves(s, matrix, input, last, packed, bias.data(), y);
    fewbit_row_linear_int8(&matrix, &last, bias.data(), twin.data(), s.rows, FEWBIT_FLOAT32, isa, 2);
    if (memcmp(y.data() + (s.tokens - 1) * s.rows, twin.data(), s.rows * sizeof(float)))
      fail(s, bits, isa, "integers of a token alone differ");
  }
}

void check(const Shape& s, int32_t bits, bool half, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int64_t unit = bits % 3 ? 1 : 3, chunk = 128 * unit / bits, chunks = (s.columns + chunk - 1) / chunk;
  const int64_t block = s.chunks_a_block ? s.chunks_a_block * chunk : s.columns;
  const int64_t blocks = (s.columns + block - 1) / block, tables = (s.rows + s.table_rows - 1) / s.table_rows;
  std::vector<uint8_t> codes(s.rows * s.columns), packed(s.rows * chunks * 16 * unit);
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t c = 0; c < s.columns; c++) {
      const uint32_t code = codes[r * s.columns + c] = static_cast<uint8_t>(random() & ((1u << bits) - 1));
      for (int b = 0; b < bits; b++) {
        const int64_t k = c % chunk, bit = k / 16 * bits + b, first = c / chunk / 4 * 4;
        const int64_t together = chunks - first < 4 ? chunks - first : 4;
        packed[(r * chunks + first) * 16 * unit + (bit / 8 * together + c / chunk - first) * 16 + k % 16] |=
            static_cast<uint8_t>((code >> b & 1) << bit % 8);
      }
    }
  // Levels that float16 holds, of either sign and any 11 bits, and zeros.
  std::vector<float> level(tables << bits), scale(s.rows * blocks), x(s.tokens * s.columns), bias(s.rows);
  std::vector<uint16_t> level_half(level.size());
  for (size_t i = 0; i < level.size(); i++) {
    const int n = static_cast<int>(random() % 7), mantissa = n ? static_cast<int>(random() % 1024) : 0, sign = random() % 2;
    level[i] = n ? ldexpf(static_cast<float>(sign ? -1024 - mantissa : 1024 + mantissa), n - 10) : 0;
    level_half[i] = static_cast<uint16_t>(n ? sign << 15 | (n + 15) << 10 | mantissa : 0);
  }
  for (auto& value : scale) value = normal(random);
  for (auto& value : bias) value = normal(random);
  for (auto& value : x) value = normal(random);
  const fewbit_row_tables matrix = {s.rows, s.columns, block, s.table_rows, bits, half, packed.data(),
                                    half ? static_cast<const void*>(level_half.data()) : level.data(), scale.data()};
  std::vector<double> weight(s.rows * s.columns);
  for (int64_t r = 0; r < s.rows; r++)
    for (int64_t c = 0; c < s.columns; c++)
      weight[r * s.columns + c] = static_cast<double>(scale[r * blocks + c / block]) *
                                  level[(r / s.table_rows << bits) + codes[r * s.columns + c]];
  std::vector<double> exact, size;  // of y; the sum of the magnitudes of what is added
  for (int64_t t = 0; t < s.tokens; t++)
    for (int64_t r = 0; r < s.rows; r++) {
      double sum = bias[r], magnitude = fabs(sum);
      for (int64_t c = 0; c < s.columns; c++) {
        const double product = weight[r * s.columns + c] * x[t * s.columns + c];
        sum += product, magnitude += fabs(product);
      }
      exact.push_back(sum), size.push_back(magnitude);
    }
  if (bits <= 4) check_int8(s, bits, packed, codes, x, bias, random);
  for (const int32_t isa : kIsas) {
    if (!(fewbit_caps() & isa)) continue;
    std::vector<float> y(s.tokens * s.rows, NAN), twin(y), decoded(s.rows * (s.columns + 1), NAN);
    const fewbit_input input = {x.data(), s.tokens, s.columns, 1, FEWBIT_FLOAT32};
    if (fewbit_row_linear(&matrix, &input, bias.data(), y.data(), s.rows, FEWBIT_FLOAT32, isa, 1) != FEWBIT_OK)
      return fail(s, bits, isa, "status");
    const double operations = static_cast<double>(block) / 8 + static_cast<double>(blocks) + 22;
    for (size_t i = 0; i < y.size(); i++)
      if (!(fabs(y[i] - exact[i]) <= ldexp(operations, -24) * size[i])) return fail(s, bits, isa, "error");
    fewbit_row_linear(&matrix, &input, bias.data(), twin.data(), s.rows, FEWBIT_FLOAT32, isa, 2);
    if (memcmp(y.data(), twin.data(), y.size() * sizeof(float))) fail(s, bits, isa, "two threads differ");
    const fewbit_input last = {x.data() + (s.tokens - 1) * s.columns, 1, s.columns, 1, FEWBIT_FLOAT32};
    fewbit_row_linear(&matrix, &last, bias.data(), twin.data(), s.rows, FEWBIT_FLOAT32, isa, 1);
    if (memcmp(y.data() + (s.tokens - 1) * s.rows, twin.data(), s.rows * sizeof(float)))
      fail(s, bits, isa, "token alone differs");
    const int64_t first = s.rows / 3;
    fewbit_row_decode(&matrix, first, s.rows, decoded.data(), s.columns + 1, isa, 2);
    for (int64_t r = first; r < s.rows; r++)
      for (int64_t c = 0; c < s.columns; c++)
        if (decoded[(r - first) * (s.columns + 1) + c] != static_cast<float>(weight[r * s.columns + c]))
          return fail(s, bits, isa, "decoded");
  }
}

void check_refusals() {
  uint8_t codes[64] = {};
  float values[256] = {};
  const fewbit_row_tables good = {1, 130, 128, 1, 1, 0, codes, values, values};
  const fewbit_input x = {values, 1, 130, 1, FEWBIT_FLOAT32};
  const auto call = [&](const fewbit_row_tables& matrix, int32_t isa) {
    return fewbit_row_linear(&matrix, &x, nullptr, values, 1, FEWBIT_FLOAT32, isa, 1);
  };
  if (call(good, FEWBIT_SERIAL) != FEWBIT_OK || call(good, FEWBIT_AVX512VNNI) != FEWBIT_NO_KERNEL) failures++;
  fewbit_row_tables bad = good;
  bad.block = 64;
  if (call(bad, FEWBIT_SERIAL) != FEWBIT_BAD_ARGUMENT) failures++;  // half a chunk
  bad = good, bad.bits = 5;
  if (call(bad, FEWBIT_SERIAL) != FEWBIT_BAD_ARGUMENT) failures++;
  bad = good, bad.table_rows = 0;
  if (call(bad, FEWBIT_SERIAL) != FEWBIT_BAD_ARGUMENT) failures++;
  if (fewbit_row_decode(&good, 0, 2, values, 130, FEWBIT_SERIAL, 1) != FEWBIT_BAD_ARGUMENT) failures++;
}

}  // namespace

int row_failures() {
  std::mt19937 random(11);
  check_refusals();
  for (const Shape& s : kShapes)
    for (const int32_t bits : kBits)
      for (const bool half : {false, true}) check(s, bits, half, random);
  printf("rows: %d failures\n", failures);
  return failures;
}
