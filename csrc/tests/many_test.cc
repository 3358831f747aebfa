// SPDX-License-Identifier: Apache-2.0
// fewbit_linear_many: the bits of one call a matrix on converted activations, whatever the dtypes, strides, alignment,
// and threads; conversions are written here from the definition of the formats.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <thread>
#include <vector>

#include "fewbit.h"

namespace {

int failures = 0;

struct Dtype {
  int32_t name, digits, least, most;  // fraction bits; exponents of the least and the largest normal number
};

const Dtype kDtypes[] = {{FEWBIT_FLOAT32, 23, -126, 127}, {FEWBIT_BFLOAT16, 7, -126, 127}, {FEWBIT_FLOAT16, 10, -14, 15}};

// The number that 16 bits stand for.
double value_of(const Dtype& d, uint16_t bits) {
  const int exponent = bits >> d.digits & ((1 << (15 - d.digits)) - 1), fraction = bits & ((1 << d.digits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 2 * d.most + 1) return fraction ? NAN : sign * INFINITY;
  const int whole = exponent ? fraction + (1 << d.digits) : fraction;
  return sign * ldexp(whole, (exponent ? exponent - 1 : 0) + d.least - d.digits);
}

// x rounded to the dtype: to nearest, ties to even, infinity past the largest.
double rounded(const Dtype& d, double x) {
  if (!isfinite(x) || x == 0) return x;
  const int exponent = ilogb(x) < d.least ? d.least : ilogb(x);
  const double y = ldexp(rint(ldexp(x, d.digits - exponent)), exponent - d.digits);
  return fabs(y) < ldexp(1, d.most + 1) ? y : copysign(INFINITY, x);
}

bool same(double a, double b) { return isnan(a) ? isnan(b) : a == b && signbit(a) == signbit(b); }

// Activations or results in one dtype, the first at an odd element and no byte to spare behind the last.
struct Buffer {
  Dtype dtype;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Buffer(const Dtype& d, int64_t count) : dtype(d) {
    if (d.name == FEWBIT_FLOAT32) floats.assign(count + 1, 7.0f);
    else halves.assign(count + 1, 0x4000);
  }
  void* data() { return dtype.name == FEWBIT_FLOAT32 ? static_cast<void*>(&floats[1]) : &halves[1]; }
  double at(int64_t i) const { return floats.empty() ? value_of(dtype, halves[i + 1]) : floats[i + 1]; }
  void set(int64_t i, float x, uint16_t bits) {
    if (floats.empty()) halves[i + 1] = bits;
    else floats[i + 1] = x;
  }
};

// One matrix whose arrays begin at odd bytes, or odd halves.
struct Weight {
  fewbit_matrix matrix;
  std::vector<uint8_t> packed;
  std::vector<uint16_t> scale, offset;
  std::vector<float> table, bias;

  Weight(int64_t rows, int64_t columns, int64_t block, int32_t bits, int32_t family, bool has_offset, float zero,
         std::mt19937& random)
      : packed(fewbit_tile16_bytes(rows, columns, bits) + 1) {
    const int64_t count = (rows + 15) / 16 * ((columns + block - 1) / block) * 16 + 1;
    std::vector<uint8_t> codes(rows * columns);
    for (auto& code : codes) code = static_cast<uint8_t>(random());
    fewbit_tile16_pack(codes.data(), columns, rows, columns, bits, &packed[1]);
    for (int64_t i = 0; i < count; i++) {
      scale.push_back(0x2000 + random() % 0x1000);
      offset.push_back(0x2000 + random() % 0x1000);
    }
    std::normal_distribution<float> normal;
    for (int i = 0; i < (family == FEWBIT_LUT) << bits; i++) table.push_back(normal(random));
    for (int64_t i = 0; i < rows && random() % 3; i++) bias.push_back(normal(random));
    bias.resize(bias.empty() ? 0 : rows);
    matrix = {rows, columns, block, bits, family, 1, 1, zero, &packed[1], &scale[1], nullptr, nullptr};
    if (has_offset) matrix.offset = &offset[1];
    if (family == FEWBIT_LUT) matrix.table = table.data();
  }
};

struct Setting {
  int64_t columns, x_block, tokens, step;
  int32_t isa, threads;
  const Dtype &in, &out;
};

// `weights` in one call against one call each.
void check(const std::vector<Weight>& weights, const Setting& s, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int64_t stride = (s.columns + 3) * s.step;
  Buffer x(s.in, (s.tokens - 1) * stride + (s.columns - 1) * s.step + 1);
  std::vector<float> plain;
  for (int64_t t = 0; t < s.tokens; t++)
    for (int64_t k = 0; k < s.columns; k++) {
      const uint16_t bits = static_cast<uint16_t>(random()) & (s.in.name == FEWBIT_FLOAT16 ? 0xcbff : 0xc17f);
      x.set(t * stride + k * s.step, normal(random), bits);
      plain.push_back(static_cast<float>(x.at(t * stride + k * s.step)));
    }
  const fewbit_input input = {x.data(), s.tokens, stride, s.step, s.in.name};
  std::vector<Buffer> ys;
  std::vector<fewbit_output> outputs;
  for (const Weight& w : weights) ys.emplace_back(s.out, (s.tokens - 1) * (w.matrix.rows + 2) + w.matrix.rows);
  for (size_t i = 0; i < weights.size(); i++) {
    const Weight& w = weights[i];
    outputs.push_back({&w.matrix, w.bias.empty() ? nullptr : w.bias.data(), ys[i].data(), w.matrix.rows + 2});
  }
  const int32_t count = static_cast<int32_t>(outputs.size());
  const int code = fewbit_linear_many(outputs.data(), count, &input, s.x_block, s.out.name, s.isa, s.threads);
  int wrong = code != FEWBIT_OK;
  for (size_t i = 0; i < weights.size(); i++) {
    const fewbit_matrix& w = weights[i].matrix;
    std::vector<float> y(s.tokens * w.rows);
    if (s.x_block)
      fewbit_linear_int8(&w, s.x_block, plain.data(), s.columns, s.tokens, outputs[i].bias, y.data(), w.rows, s.isa, 1);
    else
      fewbit_linear(&w, plain.data(), s.columns, s.tokens, outputs[i].bias, y.data(), w.rows, s.isa, 1);
    for (int64_t t = 0; t < s.tokens; t++)
      for (int64_t r = 0; r < w.rows; r++)
        wrong += !same(ys[i].at(t * (w.rows + 2) + r), rounded(s.out, y[t * w.rows + r]));
    for (int64_t t = 0; t + 1 < s.tokens; t++)  // between the rows of y nothing is written
      for (int64_t r = 0; r < 2; r++) wrong += ys[i].at(t * (w.rows + 2) + w.rows + r) != (s.out.digits == 23 ? 7 : 2);
  }
  if (!wrong) return;
  failures++;
  printf("FAILED many isa %d columns %lld x_block %lld tokens %lld step %lld dtypes %d to %d: status %d, %d wrong\n", s.isa,
         static_cast<long long>(s.columns), static_cast<long long>(s.x_block), static_cast<long long>(s.tokens),
         static_cast<long long>(s.step), s.in.name, s.out.name, code, wrong);
}

// Neighbours that share activations and neighbours that do not; more than share at a time.
std::vector<Weight> mixed(int64_t columns, bool integers, std::mt19937& random) {
  std::vector<Weight> weights;
  const int64_t block = columns < 64 ? columns : 64;
  for (int i = 0; i < 10; i++) weights.emplace_back(5 + 13 * i, columns, block, 4, FEWBIT_AFFINE, i == 1, i == 2, random);
  for (const int32_t bits : {2, 8}) weights.emplace_back(33, columns, columns, bits, FEWBIT_AFFINE, false, 0.5f, random);
  if (integers) return weights;
  for (int i = 0; i < 2; i++) weights.emplace_back(17, columns, block, 2, FEWBIT_LUT, i == 1, 0, random);
  weights.emplace_back(weights.back());  // copied arrays: the table is another one, of the same levels
  weights.back().matrix.table = weights.back().table.data();
  weights.emplace_back(19, columns, columns < 7 ? columns : 7, 3, FEWBIT_AFFINE, true, 0, random);
  return weights;
}

// Few bits, which few tokens may take as something else each, in one call.
void check_narrow(int32_t isa, std::mt19937& random) {
  for (const int64_t columns : {33, 97, 1100})
    for (const int64_t tokens : {1, 2})
      for (const int32_t most : {2, 3}) {
        std::vector<Weight> weights;
        const int64_t block = columns < 160 ? columns : 160;
        for (int32_t bits = 1; bits <= most; bits++)
          for (const int64_t rows : {15, 65})
            weights.emplace_back(rows, columns, block, bits, FEWBIT_AFFINE, false, 0.5f, random);
        check(weights, {columns, columns, tokens, 1, isa, 1, kDtypes[0], kDtypes[0]}, random);
      }
}

void check_isa(int32_t isa, bool integers, std::mt19937& random) {
  if (integers) check_narrow(isa, random);
  int at = 0;
  for (const int64_t columns : {1, 33, 97, 1100})
    for (const int64_t tokens : {1, 2, 3, 9, 70}) {
      if (!(fewbit_caps() & FEWBIT_AVX2) && columns * tokens > 10000) continue;  // emulated, half of the time
      const std::vector<Weight> weights = mixed(columns, integers, random);
      const int64_t x_block = integers ? (tokens % 2 ? 32 : columns) : 0;
      const Dtype &in = kDtypes[at % 3], &out = kDtypes[at / 3 % 3];
      check(weights, {columns, x_block, tokens, 1 + at / 2 % 2, isa, 1 + at % 2, in, out}, random);
      at++;
    }
}

// Every value of a dtype times one, and results on either side of every tie: each value is a token of one column.
void check_conversions() {
  uint8_t codes[8 * 64] = {};
  for (int i = 0; i < 16; i++) codes[4 * i] = 1;
  const std::vector<float> scale(16, 1.0f);
  const fewbit_matrix one = {1, 1, 1, 8, FEWBIT_AFFINE, 0, 0, 0, codes, scale.data(), nullptr, nullptr};
  const auto convert = [&](const void* from, int32_t dtype, void* to, int32_t other, size_t count) {
    const fewbit_input x = {from, static_cast<int64_t>(count), 1, 1, dtype};
    const fewbit_output out = {&one, nullptr, to, 1};
    if (fewbit_linear_many(&out, 1, &x, 0, other, FEWBIT_SERIAL, 1) != FEWBIT_OK) failures++;
  };
  for (const Dtype& d : {kDtypes[1], kDtypes[2]}) {
    std::vector<uint16_t> halves;
    std::vector<float> nears;
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
      halves.push_back(static_cast<uint16_t>(bits));
      const float exact = static_cast<float>(value_of(d, halves.back()));
      const auto next = static_cast<float>(value_of(d, static_cast<uint16_t>(bits + 1)));
      const float tie = exact / 2 + next / 2;
      for (const float near : {exact, tie, nextafterf(tie, 0), nextafterf(exact, next)}) nears.push_back(near);
    }
    std::vector<float> y(halves.size());
    std::vector<uint16_t> z(nears.size());
    convert(halves.data(), d.name, y.data(), FEWBIT_FLOAT32, y.size());
    convert(nears.data(), FEWBIT_FLOAT32, z.data(), d.name, z.size());
    for (size_t i = 0; i < y.size(); i++)
      if (!(nears[4 * i] == y[i] || (isnan(nears[4 * i]) && isnan(y[i])))) failures++;
    for (size_t i = 0; i < z.size(); i++) {
      const double expected = rounded(d, nears[i]), found = value_of(d, z[i]);
      if (!(expected == found || (isnan(expected) && isnan(found)))) failures++;
    }
  }
}

// Callers on several threads, who share one pool.
void check_callers() {
  std::vector<std::thread> callers;
  std::vector<std::mt19937> randoms;
  for (unsigned i = 0; i < 4; i++) randoms.emplace_back(i);
  for (std::mt19937& random : randoms)
    callers.emplace_back([&random] {
      const Weight w(530, 260, 64, 4, FEWBIT_AFFINE, true, 0, random);
      std::vector<float> x(260, 0.5f), expected(530), y(530);
      fewbit_linear(&w.matrix, x.data(), 260, 1, nullptr, expected.data(), 530, FEWBIT_SERIAL, 1);
      for (int i = 0; i < 40; i++) {
        fewbit_linear(&w.matrix, x.data(), 260, 1, nullptr, y.data(), 530, FEWBIT_SERIAL, 1 + i % 3);
        if (y != expected) abort();
      }
    });
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int many_failures() {
  std::mt19937 random(3);
  for (const int32_t isa : {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVX512, FEWBIT_NEON})
    if (fewbit_caps() & isa) check_isa(isa, false, random);
  for (const int32_t isa : {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVXVNNI, FEWBIT_AVX512VNNI, FEWBIT_NEON, FEWBIT_NEONDOT,
                            FEWBIT_NEONI8MM})
    if (fewbit_caps() & isa) check_isa(isa, true, random);
  check_conversions();
  check_callers();
  printf("many: %d failures\n", failures);
  return failures;
}
