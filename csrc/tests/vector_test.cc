// SPDX-License-Identifier: Apache-2.0
// fewbit_vector_linear on every instruction set of this machine against float64, from buffers of exactly the size they
// need, at odd addresses; decoded weights bit for bit; the same bits on two threads and for each token alone; refusals.
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

const Shape kShapes[] = {{1, 1, 1, 1},    {7, 31, 31, 3},   {31, 33, 7, 2},   {33, 97, 32, 5},
                         {97, 40, 40, 9}, {129, 64, 64, 8}, {530, 260, 260, 1}};
const int32_t kDims[] = {2, 4, 6, 8, 12, 16}, kBits[] = {4, 5, 7, 8, 9, 12, 15, 16};

struct Isa {
  int32_t flag;
  const char* name;
};

const Isa kIsas[] = {
    {FEWBIT_SERIAL, "serial"}, {FEWBIT_AVX2, "avx2"}, {FEWBIT_AVX512, "avx512"}, {FEWBIT_NEON, "neon"}};

int failures = 0;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Halves of 8 significant bits between 1/4 and 2, of either sign; exact as float32.
uint16_t random_half(std::mt19937& random) { return static_cast<uint16_t>((random() & 0x8be0) | 0x3400); }

float from_half(uint16_t half) {
  const float value = ldexpf(static_cast<float>((half & 0x3ff) | 0x400), (half >> 10 & 31) - 25);
  return half & 0x8000 ? -value : value;
}

struct Books {
  std::vector<uint16_t> half;
  std::vector<float> single;

  Books(int64_t blocks, int32_t bits, int32_t dim, std::mt19937& random) {
    const int64_t width = dim <= 4 ? 4 : dim <= 8 ? 8 : 16;
    for (int64_t i = 0; i < (blocks << bits) * width; i++) {
      half.push_back(i % width < dim ? random_half(random) : 0);
      single.push_back(i % width < dim ? from_half(half.back()) : 0.0f);
    }
  }
};

struct Case {
  Shape shape;
  int32_t dim, bits, residual_bits;
  bool use_half;
  std::vector<uint32_t> first, second;  // indices, (rows of codes, columns)
  std::vector<uint8_t> packed;          // one byte in front, so that codes lie at an odd address
  Books book, residual;
  std::vector<float> x, bias;
  std::vector<double> exact, size;  // of y; the sum of the magnitudes of what is added
  fewbit_vectors matrix;

  Case(Shape s, int32_t d, int32_t b, int32_t r, bool half, std::mt19937& random)
      : shape(s), dim(d), bits(b), residual_bits(r), use_half(half), book(ceil_div(s.columns, s.block), b, d, random),
        residual(ceil_div(s.columns, s.block), r ? r : 4, d, random) {
    const int64_t units = ceil_div(s.rows, d), tiles = ceil_div(units, 8);
    packed.resize(1 + tiles * s.columns * (b + r));
    for (int64_t unit = 0; unit < units; unit++)
      for (int64_t c = 0; c < s.columns; c++) {
        first.push_back(random() & ((1u << b) - 1));
        second.push_back(r ? random() & ((1u << r) - 1) : 0);
        const int64_t at = 1 + (unit / 8 * s.columns + c) * (b + r);
        place(first.back(), b, at, unit % 8);
        place(second.back(), r, at + b, unit % 8);
      }
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < s.tokens * s.columns; i++) x.push_back(normal(random));
    for (int64_t i = 0; i < s.rows; i++) bias.push_back(normal(random));
    matrix = {s.rows, s.columns, s.block, d, b, r, half, packed.data() + 1, nullptr, nullptr};
    matrix.book = half ? static_cast<const void*>(book.half.data()) : book.single.data();
    if (r) matrix.residual = half ? static_cast<const void*>(residual.half.data()) : residual.single.data();
    solve();
  }

  void solve() {
    exact.resize(shape.tokens * shape.rows), size.resize(exact.size());
    for (int64_t r = 0; r < shape.rows; r++) {
      std::vector<double> weights;
      for (int64_t c = 0; c < shape.columns; c++) weights.push_back(weight(r, c));
      for (int64_t t = 0; t < shape.tokens; t++) {
        double sum = bias[r], magnitude = fabs(sum);
        for (int64_t c = 0; c < shape.columns; c++) {
          const double product = weights[c] * x[t * shape.columns + c];
          sum += product, magnitude += fabs(product);
        }
        exact[t * shape.rows + r] = sum, size[t * shape.rows + r] = magnitude;
      }
    }
  }

  void place(uint32_t index, int32_t width, int64_t byte, int64_t n) {
    for (int32_t i = 0; i < width; i++) packed[byte + (n * width + i) / 8] |= (index >> i & 1) << (n * width + i) % 8;
  }

  float weight(int64_t row, int64_t column) const {
    const int64_t width = dim <= 4 ? 4 : dim <= 8 ? 8 : 16, unit = row / dim * shape.columns + column;
    const int64_t block = column / shape.block;
    const float w = book.single[((block << bits) + first[unit]) * width + row % dim];
    if (!residual_bits) return w;
    return w + residual.single[((block << residual_bits) + second[unit]) * width + row % dim];
  }
};

void fail(const Case& c, const char* isa, const char* what, double found, double allowed) {
  failures++;
  printf("FAILED vector on %s dim %d bits %d+%d half %d rows %lld columns %lld tokens %lld: %s %g, allowed %g\n", isa,
         c.dim, c.bits, c.residual_bits, c.use_half, static_cast<long long>(c.shape.rows),
         static_cast<long long>(c.shape.columns), static_cast<long long>(c.shape.tokens), what, found, allowed);
}

int run(const Case& c, int64_t token, int64_t tokens, float* y, int32_t isa, int32_t threads) {
  const fewbit_input x = {c.x.data() + token * c.shape.columns, tokens, c.shape.columns, 1, FEWBIT_FLOAT32};
  return fewbit_vector_linear(&c.matrix, &x, c.bias.data(), y, c.shape.rows, FEWBIT_FLOAT32, isa, threads);
}

void check(const Case& c, const Isa& isa) {
  const int64_t rows = c.shape.rows, tokens = c.shape.tokens;
  std::vector<float> y(tokens * rows, NAN), twin(tokens * rows, NAN);
  if (run(c, 0, tokens, y.data(), isa.flag, 1) != FEWBIT_OK) return fail(c, isa.name, "status", 1, 0);
  for (size_t i = 0; i < y.size(); i++) {
    // one rounding a product added (two where the ISA has no fused multiply-add), and one of the bias
    const double bound = ldexp(1, -24) * static_cast<double>(c.shape.columns + 2) * c.size[i] * 1.01;
    const double error = fabs(y[i] - c.exact[i]);
    if (!(error <= bound)) return fail(c, isa.name, "error", error, bound);
  }
  run(c, 0, tokens, twin.data(), isa.flag, 2);
  if (memcmp(y.data(), twin.data(), y.size() * sizeof(float))) fail(c, isa.name, "two threads differ", 1, 0);
  for (int64_t t = 0; t < tokens; t++) run(c, t, 1, twin.data() + t * rows, isa.flag, 1);
  if (memcmp(y.data(), twin.data(), y.size() * sizeof(float))) fail(c, isa.name, "a token alone differs", 1, 0);
}

void check_decode(const Case& c, const Isa& isa) {
  const int64_t tile = 8 * c.dim, tiles = ceil_div(c.shape.rows, tile);
  for (int64_t begin = 0; begin < tiles; begin += 2) {
    const int64_t end = begin + 2 < tiles ? begin + 2 : tiles, stride = (end - begin) * tile;
    std::vector<float> out(c.shape.columns * stride, NAN);
    if (fewbit_vector_decode(&c.matrix, begin, end, out.data(), stride, isa.flag, 2) != FEWBIT_OK)
      return fail(c, isa.name, "decode status", 1, 0);
    for (int64_t r = begin * tile; r < end * tile && r < c.shape.rows; r++)
      for (int64_t k = 0; k < c.shape.columns; k++) {
        const float found = out[k * stride + r - begin * tile];
        if (found != c.weight(r, k)) return fail(c, isa.name, "decoded", found, c.weight(r, k));
      }
  }
}

void check_refusals(std::mt19937& random) {
  const Case c({33, 97, 32, 1}, 8, 6, 5, true, random);
  const fewbit_input x = {c.x.data(), 1, 97, 1, FEWBIT_FLOAT32};
  std::vector<float> y(33);
  std::vector<fewbit_vectors> bad(14, c.matrix);
  bad[0].rows = 0, bad[1].columns = -1, bad[2].block = 0, bad[3].block = 98, bad[4].dim = 3, bad[5].dim = 32;
  bad[6].bits = 3, bad[7].bits = 17, bad[8].residual_bits = 3, bad[9].residual_bits = 17, bad[10].codes = nullptr;
  bad[11].book = nullptr, bad[12].residual = nullptr, bad[13].rows = int64_t{1} << 40;
  for (const fewbit_vectors& w : bad) {
    if (fewbit_vector_linear(&w, &x, nullptr, y.data(), 33, FEWBIT_FLOAT32, FEWBIT_SERIAL, 1) != FEWBIT_BAD_ARGUMENT)
      fail(c, "serial", "no refusal", static_cast<double>(&w - bad.data()), 0);
    if (fewbit_vector_decode(&w, 0, 1, y.data(), 64, FEWBIT_SERIAL, 1) != FEWBIT_BAD_ARGUMENT)
      fail(c, "serial", "no refusal to decode", static_cast<double>(&w - bad.data()), 0);
  }
  if (fewbit_vector_linear(&c.matrix, &x, nullptr, y.data(), 33, FEWBIT_FLOAT32, 1 << 20, 1) != FEWBIT_NO_KERNEL)
    fail(c, "none", "no refusal", 0, 0);
}

}  // namespace

int vector_failures() {
  std::mt19937 random(4);
  int turn = 0;
  for (const Shape& shape : kShapes)
    for (int32_t dim : kDims)
      for (int32_t bits : kBits) {
        if (ceil_div(shape.columns, shape.block) << bits > 1 << 17) continue;  // books that only take time
        if (!(fewbit_caps() & FEWBIT_AVX2) && bits > 12 && turn++ % 4) continue;  // emulated, most of it
        const int32_t residual_bits = turn % 3 == 0 ? kBits[turn / 3 % 6] : 0;
        const Case c(shape, dim, bits, residual_bits, turn++ % 2, random);
        for (const Isa& isa : kIsas)
          if (fewbit_caps() & isa.flag) check(c, isa), check_decode(c, isa);
      }
  check_refusals(random);
  for (const Isa& isa : kIsas)
    if (fewbit_caps() & isa.flag) printf("vector on %s\n", isa.name);
  return failures;
}
