// SPDX-License-Identifier: Apache-2.0
// fewbit_linear_int8 and FEWBIT_INT24 against float64 arithmetic on the rounded activations (or, times a table, on what
// they were), on every ISA that this machine can run; the bits must be the same on all of them, at any number of threads and
// tokens.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "fewbit.h"

namespace {

struct Shape {
  int64_t rows, columns, block, x_block, tokens;
};

// Whole rows, blocks that divide one another either way, ragged ends, more tokens than are prepared at a time.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1},        {7, 31, 31, 31, 3},     {31, 33, 32, 33, 2},    {33, 97, 32, 64, 5},   {97, 129, 64, 32, 8},
    {16, 64, 64, 4096, 1},  {80, 256, 32, 256, 1},  {65, 512, 128, 512, 9}, {17, 800, 96, 64, 2},  {33, 161, 160, 161, 70},
    {17, 530, 530, 530, 3}, {17, 600, 600, 32, 65}, {19, 1056, 352, 1056, 4},
    {530, 260, 64, 260, 2}, {17, 1100, 1100, 1100, 8}, {23, 1100, 1100, 96, 12}, {48, 320, 64, 320, 30},
};

const int32_t kIsas[] = {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVXVNNI, FEWBIT_AVX512VNNI, FEWBIT_NEON,
                         FEWBIT_NEONDOT, FEWBIT_NEONI8MM};
const char* const kNames[] = {"serial", "avx2", "avxvnni", "avx512vnni", "neon", "neondot", "neoni8mm"};

double half_of(double x) {
  const int exponent = x < ldexp(1, -14) ? -14 : ilogb(x);
  return ldexp(rint(ldexp(x, 10 - exponent)), exponent - 10);
}

int failures = 0;

// A token as FEWBIT_INT24 must round it, by the definition in fewbit.h.
void fix(const float* x, int64_t columns, double* out) {
  double largest = 0;
  for (int64_t k = 0; k < columns; k++) largest = fmax(largest, fabs(x[k]));
  int exponent = -104;
  while (largest >= ldexp(1 - ldexp(1, -7), exponent + 1)) exponent++;
  const double step = ldexp(1, exponent - 22);
  for (int64_t k = 0; k < columns; k++) {
    out[k] = step * round(x[k] / step);
    if (fabs(out[k] - x[k]) > fmax(ldexp(largest, -22), ldexp(1, -127)) || fabs(out[k]) >= step * (1 << 23)) failures++;
  }
}

// x as the kernel must round it, by the definition in fewbit.h.
std::vector<double> rounded(const std::vector<float>& x, const Shape& s) {
  std::vector<double> out(x.size());
  if (s.x_block == FEWBIT_INT24)
    for (int64_t t = 0; t < s.tokens; t++) fix(x.data() + t * s.columns, s.columns, out.data() + t * s.columns);
  if (s.x_block < 0) return out;
  for (int64_t t = 0; t < s.tokens; t++)
    for (int64_t b = 0; b < s.columns; b += s.x_block) {
      const int64_t end = b + s.x_block < s.columns ? b + s.x_block : s.columns;
      float largest = 0;
      for (int64_t k = b; k < end; k++) largest = fmaxf(largest, fabsf(x[t * s.columns + k]));
      const double scale = half_of(fmin(fmax(2 * largest / 255.0f, ldexp(1, -24)), 65504.0));
      for (int64_t k = b; k < end; k++) {
        const float shifted = x[t * s.columns + k] / static_cast<float>(scale) + 128.0f;
        out[t * s.columns + k] = scale * (fmin(fmax(rint(static_cast<double>(shifted)), 0.0), 255.0) - 128);
      }
    }
  return out;
}

void fail(const Shape& s, int32_t bits, int32_t isa, const char* what, double found, double allowed) {
  failures++;
  printf("FAILED int8 isa %d bits %d rows %lld columns %lld block %lld x_block %lld tokens %lld: %s %g, allowed %g\n", isa,
         bits, static_cast<long long>(s.rows), static_cast<long long>(s.columns), static_cast<long long>(s.block),
         static_cast<long long>(s.x_block), static_cast<long long>(s.tokens), what, found, allowed);
}

enum Table { kNone, kSmallIntegers, kIntegers, kReal };

std::vector<float> table_of(Table kind, int32_t bits, bool extreme, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> table(kind == kNone ? 0 : 1 << bits);
  const int most = kind == kIntegers ? 127 : 15;
  for (auto& value : table)
    value = kind == kReal ? normal(random) : 0.375f * static_cast<float>(static_cast<int>(random() % (2 * most + 1)) - most);
  if (extreme && !table.empty()) table.back() = kind == kReal ? -8.0f : -0.375f * static_cast<float>(most);
  return table;
}

// What a table must be computed as: small integers times a step exactly, else multiples of 1 / 32767 of the largest.
std::vector<double> levels_of(Table kind, const std::vector<float>& table, int32_t bits) {
  std::vector<double> levels(table.begin(), table.end());
  for (int32_t code = 0; kind == kNone && code < 1 << bits; code++) levels.push_back(code);
  if (kind != kReal) return levels;
  double largest = 0;
  for (const float value : table) largest = fmax(largest, fabs(value));
  float step = static_cast<float>(largest / 32767);
  if (step < largest / 32767) step = nextafterf(step, INFINITY);
  for (auto& level : levels) {
    const double exact = level;
    level = step * rint(exact / step);
    if (fabs(level - exact) > ldexp(largest, -15)) failures++;
  }
  return levels;
}

int multiply(const fewbit_matrix& matrix, int64_t x_block, const float* x, int64_t tokens, const float* bias, float* y,
             int32_t isa, int32_t threads) {
  if (x_block > 0)
    return fewbit_linear_int8(&matrix, x_block, x, matrix.columns, tokens, bias, y, matrix.rows, isa, threads);
  const fewbit_output output = {&matrix, bias, y, matrix.rows};
  const fewbit_input input = {x, tokens, matrix.columns, 1, FEWBIT_FLOAT32};
  return fewbit_linear_many(&output, 1, &input, x_block, FEWBIT_FLOAT32, isa, threads);
}

// The same codes in halves16 or bytes16 give the same bits, on the instruction set that takes them.
void check_arranged(const Shape& s, const fewbit_matrix& matrix, const float* x, const float* bias, const std::vector<float>& y) {
  const int32_t bits = matrix.bits;
  const int64_t bytes = fewbit_tile16_bytes(s.rows, s.columns, bits), tiles = (s.rows + 15) / 16;
  std::vector<uint8_t> packed(matrix.codes, matrix.codes + bytes);
  fewbit_arrange(s.rows, s.columns, bits, 0, packed.data());
  fewbit_matrix arranged = matrix;
  arranged.codes = packed.data(), arranged.arranged = 1;
  std::vector<float> found(y.size(), NAN), weights(s.columns * tiles * 16), decoded(weights);
  if (multiply(arranged, s.x_block, x, s.tokens, bias, found.data(), FEWBIT_SERIAL, 1) != FEWBIT_NO_KERNEL) failures++;
  multiply(arranged, s.x_block, x, s.tokens, bias, found.data(), FEWBIT_AVX2, 1);
  if (memcmp(found.data(), y.data(), y.size() * sizeof(float))) fail(s, bits, FEWBIT_AVX2, "halves differ", 1, 0);
  for (int64_t t = 0; t < s.tokens; t += 3) {
    multiply(arranged, s.x_block, x + t * s.columns, 1, bias, found.data(), FEWBIT_AVX2, 1);
    if (memcmp(found.data(), y.data() + t * s.rows, s.rows * sizeof(float))) fail(s, bits, FEWBIT_AVX2, "a token's halves differ", 1, 0);
  }
  for (const int64_t first : {int64_t{0}, tiles - 1}) {
    fewbit_decode(&matrix, first, tiles, weights.data(), tiles * 16, FEWBIT_AVX2, 1);
    if (fewbit_decode(&arranged, first, tiles, decoded.data(), tiles * 16, FEWBIT_AVX2, 1) != FEWBIT_OK) failures++;
    if (memcmp(weights.data(), decoded.data(), weights.size() * sizeof(float))) fail(s, bits, FEWBIT_AVX2, "halves decode", 1, 0);
  }
  fewbit_arrange(s.rows, s.columns, bits, 1, packed.data());
  if (memcmp(packed.data(), matrix.codes, bytes)) fail(s, bits, FEWBIT_AVX2, "halves and back", 1, 0);
}

// Of each token but every `usual`-th activations that are small but for a few, of which two as large as any are neighbours,
// beside codes 0: those are left out of sums that have no room for them.
void make_tails(const Shape& s, int64_t usual, std::vector<float>& x, std::vector<uint8_t>& codes, std::mt19937& random) {
  for (int64_t t = 0; t < s.tokens; t++) {
    if (usual && t % usual == 2) continue;
    for (int64_t c = 0; c < s.columns; c++) {
      const float any = static_cast<float>(random() % 2001) / 1000 - 1;
      x[t * s.columns + c] = 3 * any * powf(any, 12);
    }
    const int64_t pair = t * 4 % s.columns, other = pair + 1 < s.columns ? pair + 1 : pair;
    x[t * s.columns + pair] = x[t * s.columns + other] = -3;  // -128
    for (int64_t r = 0; r < s.rows; r += 2) codes[r * s.columns + pair] = codes[r * s.columns + other] = 0;
  }
}

// `tails`: 0: none; 1: of all tokens; else of all but every so many.
double check(const Shape& s, int32_t bits, Table kind, bool has_offset, bool extreme, std::mt19937& random, int64_t tails = 0) {
  std::normal_distribution<float> normal;
  const int64_t tiles = (s.rows + 15) / 16, blocks = (s.columns + s.block - 1) / s.block;
  std::vector<uint8_t> codes(s.rows * s.columns), packed(fewbit_tile16_bytes(s.rows, s.columns, bits));
  for (int64_t i = 0; i < s.rows * s.columns; i++)
    codes[i] = !extreme ? random() & ((1u << bits) - 1) : i / s.columns % 2 ? 0 : (1u << bits) - 1;
  std::vector<float> scale(tiles * blocks * 16), offset(scale.size()), x(s.tokens * s.columns), bias(s.rows);
  for (auto& value : scale) value = normal(random);
  for (auto& value : offset) value = normal(random);
  for (auto& value : bias) value = s.rows % 16 ? normal(random) : 0;
  const float* const added = s.rows % 16 ? bias.data() : nullptr;
  for (auto& value : x) value = normal(random) * static_cast<float>(random() % 100);
  for (size_t k = 0; extreme && k < x.size(); k++) x[k] = k / s.columns % 2 ? 3.0f : -3.0f;  // 127 or -128
  for (size_t k = 63; extreme && k < x.size(); k += 67) x[k] *= 0.9933f;  // less by 1: sums are odd as well
  for (size_t k = x.size() - s.columns + 1; extreme && s.tokens > 2 && k < x.size(); k++) x[k] /= 2;  // pairs of 128
  if (tails) make_tails(s, tails > 1 ? tails : 0, x, codes, random);
  fewbit_tile16_pack(codes.data(), s.columns, s.rows, s.columns, bits, packed.data());
  const float middle = static_cast<float>(1u << bits) / 2, any = static_cast<float>(random() % (2u << bits)) / 2;
  const float zero = kind != kNone ? 0 : extreme ? (s.tokens % 2 ? 0 : middle) : random() % 2 ? middle : any;
  const std::vector<float> table = table_of(kind, bits, extreme, random);
  const bool products = kind != kNone && s.x_block == FEWBIT_INT24;  // are what is rounded
  const std::vector<double> levels = levels_of(products ? kIntegers : kind, table, bits);
  const fewbit_matrix matrix = {s.rows, s.columns, s.block, bits, kind == kNone ? FEWBIT_AFFINE : FEWBIT_LUT, 0, 0, zero,
                                packed.data(), scale.data(), has_offset ? offset.data() : nullptr,
                                kind == kNone ? nullptr : table.data()};
  const std::vector<double> inputs = products ? std::vector<double>(x.begin(), x.end()) : rounded(x, s);
  double most = 0;  // of the levels
  for (const double level : levels) most = fmax(most, fabs(level));
  std::vector<float> first;
  double worst = 0;
  for (const int32_t isa : kIsas) {
    if (!(fewbit_caps() & isa)) continue;
    std::vector<float> y(s.tokens * s.rows, NAN), twin(y), single(s.rows);
    const int code = multiply(matrix, s.x_block, x.data(), s.tokens, added, y.data(), isa, 1);
    const bool serves = products ? isa == FEWBIT_SERIAL || isa == FEWBIT_AVX2 : isa != FEWBIT_NEON;
    if (s.x_block < 0 && code == FEWBIT_NO_KERNEL && !serves) continue;
    if (code != FEWBIT_OK) {
      fail(s, bits, isa, "status", code, 0);
      continue;
    }
    if (first.empty()) {  // others have the same bits
      first = y;
      for (int64_t r = 0; r < s.rows; r++) {
        std::vector<double> weight, size;
        double scales = 0;
        for (int64_t c = 0; c < s.columns; c++) {
          const int64_t at = (r / 16 * blocks + c / s.block) * 16 + r % 16;
          const double level = levels[codes[r * s.columns + c]], o = has_offset ? offset[at] : 0;
          weight.push_back(scale[at] * (level - zero) + o);
          size.push_back(fabs(scale[at]) * (fabs(level) + zero) + fabs(o));
          scales += fabs(scale[at]);
        }
        for (int64_t t = 0; t < s.tokens; t++) {
          const double* const input = inputs.data() + t * s.columns;
          double sum = bias[r], magnitude = fabs(sum), largest = 0;
          for (int64_t c = 0; c < s.columns; c++) sum += weight[c] * input[c], magnitude += size[c] * fabs(input[c]);
          for (int64_t c = 0; c < s.columns && products; c++) largest = fmax(largest, fabs(input[c]));
          const double segments = static_cast<double>((s.columns + 31) / 32);
          const double inexact = products ? ldexp(scales * largest * most, bits == 1 ? -21 : -22) : 0;
          const double bound = ldexp(2 * segments + 6, -24) * magnitude + inexact, error = fabs(y[t * s.rows + r] - sum);
          if (!(error <= bound)) return fail(s, bits, isa, "error", error, bound), 1;
          if (bound > 0) worst = fmax(worst, error / bound);
        }
      }
    }
    if (memcmp(first.data(), y.data(), y.size() * sizeof(float))) fail(s, bits, isa, "differs from serial", 1, 0);
    if (isa == FEWBIT_AVX2 && (bits == 3 || (bits == 1 && kind == kNone)) && s.x_block > 0) check_arranged(s, matrix, x.data(), added, y);
    if (isa == FEWBIT_SERIAL && !(fewbit_caps() & FEWBIT_AVX2)) continue;  // emulated, slow, and the same as beside AVX2
    multiply(matrix, s.x_block, x.data(), s.tokens, added, twin.data(), isa, 2);
    if (memcmp(y.data(), twin.data(), y.size() * sizeof(float))) fail(s, bits, isa, "two threads differ", 1, 0);
    for (int64_t t = 0; t < s.tokens; t += 7) {
      multiply(matrix, s.x_block, x.data() + t * s.columns, 1, added, single.data(), isa, 1);
      if (memcmp(y.data() + t * s.rows, single.data(), s.rows * sizeof(float)))
        fail(s, bits, isa, "token alone differs", static_cast<double>(t), 0);
    }
  }
  return worst;
}

void check_refusals() {
  uint8_t codes[128] = {};
  float values[64] = {};
  fewbit_matrix odd = {1, 48, 16, 1, FEWBIT_AFFINE, 0, 0, 0, codes, values, nullptr, nullptr};
  const auto call = [&](int64_t x_block) {
    return fewbit_linear_int8(&odd, x_block, values, 48, 1, nullptr, values, 1, FEWBIT_SERIAL, 1);
  };
  if (call(48) != FEWBIT_BAD_ARGUMENT) failures++;  // blocks of half a chunk
  odd.block = 48;
  if (call(0) != FEWBIT_BAD_ARGUMENT || call(16) != FEWBIT_BAD_ARGUMENT || call(32) != FEWBIT_OK) failures++;
  odd.arranged = 1;
  if (call(48) != FEWBIT_NO_KERNEL) failures++;
  odd.bits = 2;
  if (call(48) != FEWBIT_BAD_ARGUMENT) failures++;
  odd.arranged = 0, odd.bits = 1;
  odd.family = FEWBIT_LUT;
  if (call(48) != FEWBIT_BAD_ARGUMENT) failures++;  // no table
  float levels[128] = {};
  odd.table = levels;
  if (call(48) != FEWBIT_OK) failures++;
  odd.bits = 7;
  if (call(48) != FEWBIT_BAD_ARGUMENT) failures++;
  odd.bits = 1;
  for (const float bad : {NAN, INFINITY}) {
    const float table[2] = {1.0f, bad};
    odd.table = table;
    if (call(48) != FEWBIT_BAD_ARGUMENT) failures++;
  }
}

// The longest rows of codes that are summed whole, the shortest that are not, and some whose sums are no float32: the
// largest sums of one token and of many, which of the longest rows, and emulated of all long ones, would take most of the
// time; and any sums.
double check_longest(std::mt19937& random) {
  double worst = 0;
  for (const int32_t bits : {1, 2, 4, 7}) {
    const int64_t most = ((1 << 24) - 1) / (128 * ((1 << bits) - 1));
    for (const int64_t columns : {most, most + 1, most * 2}) {
      const auto longest = [&](int64_t tokens, bool extreme) {
        worst = fmax(worst, check({1, columns, columns, columns, tokens}, bits, kNone, false, extreme, random));
      };
      longest(1, true);
      if (bits > 1 || fewbit_caps() & FEWBIT_AVX2) longest(1, false);
      if (fewbit_caps() & FEWBIT_AVX2 ? bits > 1 || columns <= most + 1 : bits > 2) longest(9, true);
    }
  }
  return worst;
}

// A token with NaN or infinity gives NaN, and nothing else does.
void check_poison() {
  const std::vector<uint8_t> codes(16 * 32 * 8 / 8 * 4, 3);
  const std::vector<float> scale(16, 1.0f);
  const fewbit_matrix matrix = {16, 32, 32, 4, FEWBIT_AFFINE, 0, 0, 0, codes.data(), scale.data(), nullptr, nullptr};
  for (const int32_t isa : kIsas)
    for (const float bad : {NAN, INFINITY, -INFINITY})
      for (const int64_t x_block : {32, static_cast<int>(FEWBIT_INT24)}) {
        std::vector<float> x(3 * 32, 1.0f), y(3 * 16);
        x[32 + 5] = bad;
        if (multiply(matrix, x_block, x.data(), 3, nullptr, y.data(), isa, 1) != FEWBIT_OK) continue;
        for (int i = 0; i < 48; i++)
          if ((i / 16 == 1) != static_cast<bool>(isnan(y[i]))) failures++;
      }
}

}  // namespace

int int8_failures() {
  std::mt19937 random(2);
  double worst = 0;
  int turn = 0;
  for (const Shape& shape : kShapes) {
    turn++;
    for (int32_t bits = 1; bits <= 8; bits++)
      for (const Table table : {kNone, kSmallIntegers, kIntegers, kReal})
        for (int variant = 0; variant < 3 && (table == kNone || bits <= 6); variant++)
          // Emulated, they take minutes: one of three by turns, and of tables, of which it is so everywhere, one of six.
          if (table == kNone ? fewbit_caps() & FEWBIT_AVX2 || (turn + bits + variant) % 3 == 0
                             : (turn + bits + table + variant) % (fewbit_caps() & FEWBIT_AVX2 ? 3 : 6) == 0)
            worst = fmax(worst, check(shape, bits, table, variant == 1, variant == 2, random));
  }
  for (const Shape& shape : kShapes)  // only there is it written down which products do not fit
    for (const int64_t tails : {1, 3})
      for (const int32_t bits : {1, 3, 4, 5, 6, 8})
        if (shape.tokens > 2 && fewbit_caps() & FEWBIT_AVX2)
          worst = fmax(worst, check(shape, bits, bits % 7 == 1 ? kNone : kIntegers, false, false, random, tails));
  for (Shape shape : kShapes) {  // emulated: a third of them, and of tables, which serial alone multiplies so, fewer
    turn++;
    for (int32_t bits = 1; bits <= 8; bits++)
      for (int variant = 0; variant < 3 && (shape.x_block = FEWBIT_INT24); variant++)
        if (fewbit_caps() & FEWBIT_AVX2 || (turn + bits + variant) % 3 == 0)
          worst = fmax(worst, check(shape, bits, kNone, variant == 1, variant == 2, random));
    for (int32_t bits = 1; bits <= 4 && (fewbit_caps() & FEWBIT_AVX2 || shape.tokens <= 2); bits++)
      for (const Table table : {kSmallIntegers, kReal}) {
        shape.x_block = FEWBIT_INT24;
        const int variant = (turn + bits + table) % 3;
        worst = fmax(worst, check(shape, bits, table, variant == 1, variant == 2, random));
      }
  }
  worst = fmax(worst, check_longest(random));
  check_refusals();
  check_poison();
  for (size_t i = 0; i < sizeof kIsas / sizeof *kIsas; i++)
    if (fewbit_caps() & kIsas[i]) printf("int8 on %s\n", kNames[i]);
  printf("int8: at most %.2f of the bound\n", worst);
  return failures;
}
