// SPDX-License-Identifier: Apache-2.0
// fewbit_vector_linear_int8 on every instruction set of this machine against float64, from codes of exactly the size they
// need, at odd addresses; the same bits on all of them, on two threads and for each token alone; refusals.
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

const Shape kShapes[] = {{1, 1, 1, 1, 1},     {7, 31, 31, 31, 3},    {33, 97, 32, 64, 5},  {97, 129, 64, 32, 8},
                         {130, 256, 256, 256, 2}, {65, 512, 128, 512, 9}, {530, 260, 260, 64, 1}, {17, 600, 600, 600, 131}};
const int32_t kDims[] = {2, 4, 6, 8, 12, 16};

struct Isa {
  int32_t flag;
  const char* name;
};

const Isa kIsas[] = {{FEWBIT_SERIAL, "serial"}, {FEWBIT_AVX2, "avx2"}, {FEWBIT_AVX512VBMI, "avx512vbmi"}};

int failures = 0;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The chunk of 16 x 32 codes from (row, column), those beyond the edge being 0, as fewbit_byte_vectors draws 6 bits.
void pack_six(const std::vector<uint16_t>& codes, int64_t rows, int64_t columns, int64_t row, int64_t column, uint8_t* out) {
  const auto code = [&](int64_t u, int64_t k) {
    return row + u < rows && column + k < columns ? codes[(row + u) * columns + column + k] : 0;
  };
  for (int64_t v = 0; v < 6; v++)
    for (int64_t u = 0; u < 16; u++)
      for (int64_t k = 0; k < 4; k++)
        out[v * 64 + u * 4 + k] =
            static_cast<uint8_t>(code(u, 4 * v + k) | (code(u, 24 + v / 3 * 4 + k) >> v % 3 * 2 & 3) << 6);
}

struct Case {
  Shape shape;
  int32_t dim, bits[2], books, entries;
  bool wide;                         // whether entries are loaded one by one
  std::vector<uint16_t> codes[2];
  std::vector<uint8_t> packed, book;  // packed has one byte in front
  std::vector<float> step, offset, x, bias;
  fewbit_byte_vectors matrix;

  // `extreme`: the largest bytes by the most negative activations.
  Case(Shape s, int32_t d, int32_t b, int32_t r, bool extreme, std::mt19937& random)
      : shape(s), dim(d), bits{b, r}, books(r ? 2 : 1), entries(b <= 6 && r <= 6 ? 64 : 256), wide(b > 8 || r > 8) {
    const int64_t units = ceil_div(s.rows, d), chunks = ceil_div(units, 16) * ceil_div(s.columns, 32);
    packed.resize(1 + chunks * (b + r) * 64);
    for (int i = 0; i < books; i++)
      for (int64_t k = 0; k < units * s.columns; k++)
        codes[i].push_back(static_cast<uint16_t>(random() & ((1u << bits[i]) - 1)));
    for (int i = 0; i < books && wide; i++) pack_wide(i);
    for (int i = 0; i < books && !wide; i++) {
      const std::vector<uint8_t> narrow(codes[i].begin(), codes[i].end());
      std::vector<uint8_t> apart(fewbit_tile16_bytes(units, s.columns, bits[i]));
      fewbit_tile16_pack(narrow.data(), s.columns, units, s.columns, bits[i], apart.data());
      const int64_t wide = ceil_div(s.columns, 32);
      for (int64_t c = 0; bits[i] == 6 && c < chunks; c++)
        pack_six(codes[i], units, s.columns, c / wide * 16, c % wide * 32, apart.data() + c * 384);
      const int64_t size = bits[i] * 64;
      for (int64_t c = 0; c < chunks; c++)
        memcpy(packed.data() + 1 + c * (b + r) * 64 + (i ? b * 64 : 0), apart.data() + c * size, size);
    }
    const int64_t blocks = ceil_div(s.columns, s.block);
    std::normal_distribution<float> normal;
    for (int64_t k = 0; k < blocks * d; k++) step.push_back(normal(random)), offset.push_back(normal(random));
    if (wide) fill_wide(blocks, extreme, random);
    else book.resize(blocks * books * d * entries);
    for (int64_t k = 0; !wide && k < static_cast<int64_t>(book.size()); k++) {
      const int64_t i = k / entries / d % books, at = k % entries;
      const uint8_t value = extreme ? (i ? 0 : 255) : random() & (books == 2 ? 127 : 255);
      book[k] = at < 1 << bits[i] ? value : book[k - at + at % (1 << bits[i])];
    }
    // The scale of every block is 1, as its largest magnitude is 127.5.
    for (int64_t k = 0; k < s.tokens * s.columns; k++) {
      const float inner = static_cast<float>(static_cast<int>(random() % 1001) - 500) / 4;
      x.push_back(extreme || k % s.columns % s.x_block == 0 ? -127.5f : inner);
    }
    for (int64_t k = 0; k < s.rows; k++) bias.push_back(normal(random));
    matrix = {s.rows, s.columns, s.block, d, b, r, packed.data() + 1, book.data(), step.data(), offset.data()};
  }

  int64_t width() const { return dim <= 8 ? 8 : 16; }
  int64_t wide_bytes() const { return ((1 << bits[0]) + (books == 2 ? 1 << bits[1] : 0)) * width(); }

  // The indices of book i, bit by bit.
  void pack_wide(int i) {
    const int64_t units = ceil_div(shape.rows, dim), chunks = ceil_div(shape.columns, 32);
    for (int64_t k = 0; k < units * shape.columns; k++) {
      const int64_t column = k % shape.columns, chunk = k / shape.columns * chunks + column / 32;
      uint8_t* out = packed.data() + 1 + chunk * (bits[0] + bits[1]) * 4 + (i ? bits[0] * 4 : 0);
      for (int64_t bit = 0, at = column % 32 * bits[i]; bit < bits[i]; bit++, at++)
        out[at / 8] = static_cast<uint8_t>(out[at / 8] | (codes[i][k] >> bit & 1) << at % 8);
    }
  }

  void fill_wide(int64_t blocks, bool extreme, std::mt19937& random) {
    book.resize(blocks * wide_bytes());
    for (int64_t k = 0; k < static_cast<int64_t>(book.size()); k++) {
      const bool second = k % wide_bytes() >= width() << bits[0];
      const uint8_t value = extreme ? (second ? 0 : 255) : random() & (books == 2 ? 127 : 255);
      book[k] = k % width() < dim ? value : 0;
    }
  }

  double byte(int64_t row, int64_t column) const {
    int sum = 0;
    for (int i = 0; i < books && wide; i++) {
      const int64_t at = codes[i][row / dim * shape.columns + column] + (i ? 1 << bits[0] : 0);
      sum += book[column / shape.block * wide_bytes() + at * width() + row % dim];
    }
    if (wide) return sum;
    for (int i = 0; i < books; i++)
      sum += book[((column / shape.block * books + i) * dim + row % dim) * entries +
                  codes[i][row / dim * shape.columns + column]];
    return sum;
  }
};

void fail(const Case& c, const char* isa, const char* what, double found, double allowed) {
  failures++;
  printf("FAILED int8 vector on %s dim %d bits %d+%d rows %lld columns %lld tokens %lld: %s %g, allowed %g\n", isa, c.dim,
         c.bits[0], c.bits[1], static_cast<long long>(c.shape.rows), static_cast<long long>(c.shape.columns),
         static_cast<long long>(c.shape.tokens), what, found, allowed);
}

int run(const Case& c, int64_t token, int64_t tokens, float* y, int32_t isa, int32_t threads) {
  const fewbit_input x = {c.x.data() + token * c.shape.columns, tokens, c.shape.columns, 1, FEWBIT_FLOAT32};
  return fewbit_vector_linear_int8(&c.matrix, c.shape.x_block, &x, c.bias.data(), y, c.shape.rows, FEWBIT_FLOAT32, isa,
                                   threads);
}

void check_error(const Case& c, const char* isa, const std::vector<float>& y) {
  const int64_t rows = c.shape.rows, columns = c.shape.columns;
  const double operations = 2 * static_cast<double>(ceil_div(columns, 32)) + 8;
  std::vector<double> inputs;
  for (const float x : c.x) inputs.push_back(fmin(fmax(rint(x + 128.0), 0), 255) - 128);
  for (int64_t r = 0; r < rows; r++) {
    std::vector<double> weight, most;
    for (int64_t k = 0; k < columns; k++) {
      const int64_t at = k / c.shape.block * c.dim + r % c.dim;
      weight.push_back(c.offset[at] + c.step[at] * c.byte(r, k));
      most.push_back(2 * fabs(c.offset[at]) + 255 * fabs(c.step[at]));
    }
    for (int64_t t = 0; t < c.shape.tokens; t++) {
      double sum = c.bias[r], size = fabs(sum);
      for (int64_t k = 0; k < columns; k++) {
        const double q = inputs[t * columns + k];
        sum += weight[k] * q;
        size += most[k] * fabs(q);
      }
      const double bound = ldexp(operations, -24) * size, error = fabs(y[t * rows + r] - sum);
      if (!(error <= bound)) return fail(c, isa, "error", error, bound);
    }
  }
}

void check(const Case& c) {
  const int64_t rows = c.shape.rows, tokens = c.shape.tokens;
  std::vector<float> first;
  for (const Isa& isa : kIsas) {
    if (!(fewbit_caps() & isa.flag)) continue;
    std::vector<float> y(tokens * rows, NAN), twin(tokens * rows, NAN);
    if (run(c, 0, tokens, y.data(), isa.flag, 1) != FEWBIT_OK) return fail(c, isa.name, "status", 1, 0);
    if (first.empty()) first = y, check_error(c, isa.name, y);
    if (memcmp(y.data(), first.data(), y.size() * sizeof(float))) fail(c, isa.name, "differs from serial", 1, 0);
    run(c, 0, tokens, twin.data(), isa.flag, 2);
    if (memcmp(y.data(), twin.data(), y.size() * sizeof(float))) fail(c, isa.name, "two threads differ", 1, 0);
    // Of many tokens every fifth, the last one too: each place among 4 or 16 that are computed together.
    for (int64_t t = 0; t < tokens; t += tokens > 9 ? 5 : 1) {
      run(c, t, 1, twin.data(), isa.flag, 1);
      if (memcmp(y.data() + t * rows, twin.data(), rows * sizeof(float))) fail(c, isa.name, "a token alone differs", 1, 0);
    }
  }
}

void check_refusals(std::mt19937& random) {
  const Case c({33, 97, 32, 64, 1}, 8, 6, 5, false, random);
  const fewbit_input x = {c.x.data(), 1, 97, 1, FEWBIT_FLOAT32};
  std::vector<float> y(33);
  std::vector<fewbit_byte_vectors> bad(15, c.matrix);
  bad[0].rows = 0, bad[1].columns = -1, bad[2].block = 0, bad[3].block = 98, bad[4].dim = 3, bad[5].dim = 32;
  bad[6].bits = 3, bad[7].bits = 17, bad[8].residual_bits = 3, bad[9].residual_bits = 9, bad[10].codes = nullptr;
  bad[11].book = nullptr, bad[12].step = nullptr, bad[13].offset = nullptr, bad[14].block = 48;
  const auto call = [&](const fewbit_byte_vectors& w, int64_t x_block, int32_t isa) {
    return fewbit_vector_linear_int8(&w, x_block, &x, nullptr, y.data(), 33, FEWBIT_FLOAT32, isa, 1);
  };
  for (const auto& w : bad)
    if (call(w, 64, FEWBIT_SERIAL) != FEWBIT_BAD_ARGUMENT)
      fail(c, "serial", "no refusal", static_cast<double>(&w - bad.data()), 0);
  for (const int64_t x_block : {int64_t{0}, int64_t{-1}, int64_t{48}})
    if (call(c.matrix, x_block, FEWBIT_SERIAL) != FEWBIT_BAD_ARGUMENT)
      fail(c, "serial", "no refusal of x_block", static_cast<double>(x_block), 0);
  if (call(c.matrix, 64, 1 << 20) != FEWBIT_NO_KERNEL) fail(c, "none", "no refusal", 0, 0);
}

}  // namespace

int int8_vector_failures() {
  std::mt19937 random(5);
  int turn = 0;
  const bool all = fewbit_caps() & FEWBIT_AVX2;  // else serial is alone, emulated, and the same code as beside AVX2
  for (const Shape& shape : kShapes)
    for (int32_t dim : kDims)
      for (int32_t bits = 4 + turn % 2; bits <= 8; bits += 2, turn++) {  // all of them, over the shapes
        if (all || turn % 11 == 0) check(Case(shape, dim, bits, turn % 2 ? 4 + turn / 2 % 5 : 0, false, random));
        if (turn % (all ? 7 : 25) == 0) check(Case(shape, dim, bits, turn % 2 ? 6 : 0, true, random));
      }
  for (const Shape& shape : kShapes)
    for (int32_t dim : kDims)
      for (int32_t bits = 9; bits <= 16; bits += 2 + turn % 3, turn++) {
        if (all || turn % 11 == 0) check(Case(shape, dim, bits, turn % 2 ? 8 + turn / 2 % 3 : 0, false, random));
        if (turn % (all ? 7 : 25) == 0) check(Case(shape, dim, 8, 9, true, random));
      }
  // Two books that one token reads as one, and, just below that, does not: of one block and of two.
  const int32_t pairs[][2] = {{4, 4}, {6, 6}, {8, 4}, {5, 7}, {7, 4}, {8, 5}};
  const Shape shapes[] = {{290, 1024, 1024, 256, 2}, {290, 1023, 1023, 1023, 1}, {290, 2080, 1024, 2080, 1}, {290, 96, 32, 96, 1}};
  for (const auto& pair : pairs)
    for (const Shape& shape : shapes)
      for (int32_t dim : {4, 8, 12}) {
        if (all || turn % 11 == 0) check(Case(shape, dim, pair[0], pair[1], turn % 5 == 0, random));
        turn++;
      }
  if (all) check(Case({9, 65536, 65536, 65536, 2}, 8, 12, 8, true, random));  // the largest sum of a whole row
  if (all) check(Case({9, 65600, 65600, 65600, 1}, 8, 9, 0, true, random));
  check_refusals(random);
  for (const Isa& isa : kIsas)
    if (fewbit_caps() & isa.flag) printf("int8 vector on %s\n", isa.name);
  return failures;
}
