// SPDX-License-Identifier: Apache-2.0
// Every kernel of this build that this machine can run against float64, on odd shapes, from buffers of exactly the
// size they need (so that a sanitizer sees any stray read). Runs natively and under qemu-user. Exit code 1 on failure.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <random>
#include <vector>

#include "fewbit.h"

int bfloat16_failures();     // bfloat16_test.cc
int decode_failures();       // decode_test.cc
int fixed_failures();        // fixed_test.cc
int grids_failures();        // grids_test.cc
int int8_failures();         // int8_test.cc
int int8_vector_failures();  // int8_vector_test.cc
int many_failures();         // many_test.cc
int matmul_failures();       // matmul_test.cc
int row_failures();          // row_test.cc
int sample_failures();       // sample_test.cc
int sparse_failures();       // sparse_test.cc
int terms_failures();        // terms_test.cc
int unfold_failures();       // unfold_test.cc
int vector_failures();       // vector_test.cc
int windows_failures();      // windows_test.cc
int xnor_failures();         // xnor_test.cc

namespace {

struct Shape {
  int64_t rows, columns, block, tokens;
};

// Sizes around the tile (16 rows, 32 columns), blocks that are whole chunks, parts of one, ragged, and the whole row.
const Shape kShapes[] = {
    {1, 1, 1, 1},     {7, 31, 31, 3},   {31, 33, 33, 2},   {33, 97, 32, 5},  {97, 129, 64, 8}, {16, 64, 16, 1},
    {17, 100, 7, 4},  {80, 256, 32, 1}, {65, 512, 128, 9}, {48, 96, 48, 33}, {130, 70, 64, 1}, {33, 161, 160, 6},
    {530, 260, 64, 2},  // large enough for the thread pool
};

struct Isa {
  int32_t flag;
  const char* name;
};

const Isa kIsas[] = {
    {FEWBIT_SERIAL, "serial"}, {FEWBIT_AVX2, "avx2"}, {FEWBIT_AVX512, "avx512"}, {FEWBIT_NEON, "neon"}};

float from_half(uint16_t half) {
  const float magnitude = static_cast<float>(half & 0x3ff);
  const int exponent = half >> 10 & 31;
  const float value = exponent ? ldexpf(magnitude + 1024, exponent - 25) : ldexpf(magnitude, -24);
  return half & 0x8000 ? -value : value;
}

// One random matrix, activations and the exact answer with its error bound.
struct Case {
  Shape shape;
  int32_t bits, family;
  bool half, has_offset;
  float zero;
  int64_t x_stride;
  std::vector<uint8_t> codes, packed;
  std::vector<float> scale, offset, table, x, bias;
  std::vector<uint16_t> half_scale, half_offset;
  std::vector<double> y, bound;
  fewbit_matrix matrix;

  Case(Shape s, int32_t b, int32_t f, bool use_half, bool use_offset, std::mt19937& random)
      : shape(s), bits(b), family(f), half(use_half), has_offset(use_offset) {
    const int64_t tiles = (s.rows + 15) / 16, blocks = (s.columns + s.block - 1) / s.block;
    std::normal_distribution<float> normal;
    codes.resize(s.rows * s.columns);
    for (auto& code : codes) code = random() & ((1u << bits) - 1);
    packed.resize(fewbit_tile16_bytes(s.rows, s.columns, bits));
    fewbit_tile16_pack(codes.data(), s.columns, s.rows, s.columns, bits, packed.data());
    for (int64_t i = 0; i < tiles * blocks * 16; i++) {
      half_scale.push_back(random() & 0xbbff);  // any finite half below 2, subnormal and negative ones included
      half_offset.push_back(random() & 0xb3ff);
      scale.push_back(half ? from_half(half_scale.back()) : normal(random));
      offset.push_back(half ? from_half(half_offset.back()) : normal(random));
    }
    zero = family == FEWBIT_AFFINE && random() % 2 ? static_cast<float>(random() % 9) / 2 : 0.0f;
    if (family == FEWBIT_LUT)
      for (int i = 0; i < 1 << bits; i++) table.push_back(normal(random));
    x_stride = s.columns + static_cast<int64_t>(random() % 3);
    x.resize((s.tokens - 1) * x_stride + s.columns);
    for (auto& value : x) value = normal(random);
    bias.resize(s.rows);
    for (auto& value : bias) value = normal(random);
    matrix = {s.rows, s.columns, s.block, bits, family, half, half, zero, packed.data(), nullptr, nullptr, nullptr};
    matrix.scale = half ? static_cast<const void*>(half_scale.data()) : scale.data();
    if (has_offset) matrix.offset = half ? static_cast<const void*>(half_offset.data()) : offset.data();
    if (family == FEWBIT_LUT) matrix.table = table.data();
    solve(blocks);
  }

  // The bound counts one rounding per operation on the longest path of a column (see fewbit_linear).
  void solve(int64_t blocks) {
    const double eps = ldexp(1, -24), depth = static_cast<double>(shape.block) + static_cast<double>(blocks) + 12;
    y.resize(shape.tokens * shape.rows), bound.resize(y.size());
    for (int64_t r = 0; r < shape.rows; r++) {
      std::vector<double> weight, size;
      for (int64_t c = 0; c < shape.columns; c++) {
        const int64_t at = (r / 16 * blocks + c / shape.block) * 16 + r % 16;
        const int code = codes[r * shape.columns + c];
        const double level = family == FEWBIT_LUT ? table[code] : code, o = has_offset ? offset[at] : 0;
        weight.push_back(scale[at] * (level - zero) + o);
        size.push_back(fabs(scale[at]) * (fabs(level) + zero) + fabs(o));
      }
      for (int64_t t = 0; t < shape.tokens; t++) {
        double sum = bias[r], magnitude = fabs(sum);
        for (int64_t c = 0; c < shape.columns; c++) {
          const double input = x[t * x_stride + c];
          sum += weight[c] * input;
          magnitude += size[c] * fabs(input);
        }
        y[t * shape.rows + r] = sum;
        bound[t * shape.rows + r] = eps * depth * magnitude;
      }
    }
  }
};

int failures = 0;

void fail(const Case& c, const char* isa, const char* what, double found, double allowed) {
  failures++;
  printf("FAILED %s %s bits %d rows %lld columns %lld block %lld tokens %lld half %d offset %d: %s %g, allowed %g\n",
         isa, c.family == FEWBIT_AFFINE ? "affine" : "lut", c.bits, static_cast<long long>(c.shape.rows),
         static_cast<long long>(c.shape.columns), static_cast<long long>(c.shape.block),
         static_cast<long long>(c.shape.tokens), c.half, c.has_offset, what, found, allowed);
}

// Every element within its bound; the same bits on two threads and for each token alone. Returns the
// worst share of a bound that was used.
double check(const Case& c, const Isa& isa) {
  const int64_t tokens = c.shape.tokens, rows = c.shape.rows;
  std::vector<float> y(tokens * rows, NAN), twin(tokens * rows, NAN), single(rows, NAN);
  const int code = fewbit_linear(&c.matrix, c.x.data(), c.x_stride, tokens, c.bias.data(), y.data(), rows, isa.flag, 1);
  if (code != FEWBIT_OK) {
    fail(c, isa.name, "status", code, 0);
    return 0;
  }
  double worst = 0;
  for (size_t i = 0; i < y.size(); i++) {
    const double error = fabs(y[i] - c.y[i]);
    if (!(error <= c.bound[i])) {
      fail(c, isa.name, "error", error, c.bound[i]);
      break;
    }
    if (c.bound[i] > 0) worst = fmax(worst, error / c.bound[i]);
  }
  fewbit_linear(&c.matrix, c.x.data(), c.x_stride, tokens, c.bias.data(), twin.data(), rows, isa.flag, 2);
  if (memcmp(y.data(), twin.data(), y.size() * sizeof(float))) fail(c, isa.name, "two threads differ", 1, 0);
  for (int64_t t = 0; t < tokens; t++) {
    fewbit_linear(&c.matrix, c.x.data() + t * c.x_stride, 0, 1, c.bias.data(), single.data(), rows, isa.flag, 1);
    if (memcmp(y.data() + t * rows, single.data(), rows * sizeof(float))) {
      fail(c, isa.name, "token alone differs", static_cast<double>(t), 0);
      break;
    }
  }
  return worst;
}

// Decoded weights are those of the formula, rounded operation by operation.
void check_decode(const Case& c, const Isa& isa) {
  const int64_t tiles = (c.shape.rows + 15) / 16, blocks = (c.shape.columns + c.shape.block - 1) / c.shape.block;
  for (int64_t first = 0; first < tiles; first += 2) {
    const int64_t last = first + 2 < tiles ? first + 2 : tiles, stride = (last - first) * 16;
    std::vector<float> out(c.shape.columns * stride, NAN);
    if (fewbit_decode(&c.matrix, first, last, out.data(), stride, isa.flag, 2) != FEWBIT_OK)
      return fail(c, isa.name, "decode status", 1, 0);
    for (int64_t r = first * 16; r < last * 16 && r < c.shape.rows; r++)
      for (int64_t k = 0; k < c.shape.columns; k++) {
        const int64_t at = (r / 16 * blocks + k / c.shape.block) * 16 + r % 16;
        const int code = c.codes[r * c.shape.columns + k];
        const float level = (c.family == FEWBIT_LUT ? c.table[code] : static_cast<float>(code)) - c.zero;
        const float scaled = c.scale[at] * level, expected = c.has_offset ? scaled + c.offset[at] : scaled;
        const float found = out[k * stride + r - first * 16];
        if (found != expected) return fail(c, isa.name, "decoded", found, expected);
      }
  }
}

void check_round_trip(const Case& c) {
  std::vector<uint8_t> back(c.codes.size());
  fewbit_tile16_unpack(c.packed.data(), c.shape.rows, c.shape.columns, c.bits, back.data(), c.shape.columns);
  if (back != c.codes) fail(c, "tile16", "round trip", 1, 0);
}

void check_refusals() {
  fewbit_matrix bad{};
  float y = 0;
  if (fewbit_linear(&bad, &y, 1, 1, nullptr, &y, 1, FEWBIT_SERIAL, 1) != FEWBIT_BAD_ARGUMENT) failures++;
  if (fewbit_linear(nullptr, &y, 1, 1, nullptr, &y, 1, FEWBIT_SERIAL, 1) != FEWBIT_BAD_ARGUMENT) failures++;
  if (fewbit_decode(&bad, 0, 1, &y, 16, FEWBIT_SERIAL, 1) != FEWBIT_BAD_ARGUMENT) failures++;
  if (fewbit_tile16_bytes(0, 4, 4) != -1 || fewbit_tile16_bytes(4, 4, 9) != -1) failures++;
  if (fewbit_tile16_bytes(int64_t{1} << 40, int64_t{1} << 40, 4) != -1) failures++;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  double worst[4] = {};
  int cases = 0;
  for (const Shape& shape : kShapes)
    for (int32_t bits = 1; bits <= 8; bits++)
      for (int32_t variant = 0; variant < 8; variant++) {
        // Emulated, they take long: of both families, half of what else there is by turns.
        if (!(fewbit_caps() & FEWBIT_AVX2) && ((&shape - kShapes) + bits + variant / 2 + variant / 4) % 2) continue;
        const Case c(shape, bits, variant & 1, variant & 2, variant & 4, random);
        check_round_trip(c);
        for (int i = 0; i < 4; i++)
          if (fewbit_caps() & kIsas[i].flag) {
            worst[i] = fmax(worst[i], check(c, kIsas[i]));
            check_decode(c, kIsas[i]);
          }
        cases++;
      }
  check_refusals();
  failures += bfloat16_failures() + decode_failures() + fixed_failures() + grids_failures() + int8_failures() +
              int8_vector_failures() + many_failures() + matmul_failures() + row_failures() + sample_failures() +
              sparse_failures() + terms_failures() + unfold_failures() + vector_failures() + windows_failures() + xnor_failures();
  for (int i = 0; i < 4; i++)
    if (fewbit_caps() & kIsas[i].flag) printf("%s: at most %.2f of the bound\n", kIsas[i].name, worst[i]);
  printf("%d cases, %d failures\n", cases, failures);
  return failures ? 1 : 0;
}
