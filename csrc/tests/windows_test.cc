// SPDX-License-Identifier: Apache-2.0
// fewbit_int8_windows against float64 within its bound, windows rounded as the format does it; the same bits on every
// ISA, in every memory order and at any number of threads; from buffers of exactly the size they need.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "fewbit.h"

namespace {

const int32_t kIsas[] = {FEWBIT_SERIAL, FEWBIT_AVX2, FEWBIT_AVX512, FEWBIT_AVX512VNNI, FEWBIT_NEON, FEWBIT_NEONDOT};
const char* const kNames[] = {"serial", "avx2", "avx512", "avx512vnni", "neon", "neondot"};

int failures = 0;

// Channels and rows are of one group; the rest is down, across.
struct Shape {
  int64_t images, groups, channels, rows, height, width, kernel_h, kernel_w, step_h, step_w, padding_h, padding_w,
      dilation_h, dilation_w;
};

// Depthwise and not, steps larger than kernels, windows that see nothing, more than one band, more than one thread.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1},   {2, 7, 1, 1, 9, 5, 3, 3, 1, 1, 1, 1, 1, 1},
    {1, 5, 1, 2, 7, 33, 5, 5, 2, 2, 2, 2, 1, 1},  {3, 2, 3, 5, 8, 9, 3, 2, 2, 3, 0, 1, 1, 1},
    {1, 3, 2, 4, 6, 17, 1, 7, 1, 3, 0, 3, 1, 2},  {1, 2, 1, 1, 3, 3, 2, 2, 5, 5, 9, 9, 1, 1},
    {2, 2, 2, 3, 7, 9, 5, 2, 3, 1, 4, 1, 2, 3},   {1, 2, 40, 3, 30, 31, 3, 3, 1, 1, 1, 1, 1, 1},
    {2, 9, 1, 1, 40, 97, 3, 3, 1, 1, 1, 1, 1, 1},
};

int64_t windows(int64_t size, int64_t kernel, int64_t step, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / step + 1;
}

// The nearest float16, ties to even, of what a scale can be.
double half(double x) {
  const double unit = ldexp(1, std::max(ilogb(x), -14) - 10);
  return nearbyint(x / unit) * unit;
}

struct Case {
  Shape s;
  fewbit_windows g;
  std::vector<float> x, weight, bias;
  std::vector<double> answer, bound;

  Case(const Shape& shape, bool last, std::mt19937& random) : s(shape) {
    std::normal_distribution<float> normal;
    const int64_t channels = s.groups * s.channels, pixels = s.height * s.width;
    g = {channels, s.height, s.width, channels * pixels, last ? 1 : pixels, last ? s.width * channels : s.width,
         last ? channels : 1, s.kernel_h, s.kernel_w, s.step_h, s.step_w, s.padding_h, s.padding_w, s.dilation_h,
         s.dilation_w, windows(s.height, s.kernel_h, s.step_h, s.padding_h, s.dilation_h),
         windows(s.width, s.kernel_w, s.step_w, s.padding_w, s.dilation_w), 4};
    x.resize(static_cast<size_t>(s.images * channels * pixels));
    for (int64_t n = 0; n < s.images; n++)
      for (int64_t c = 0; c < channels; c++) {
        const float size = ldexpf(1, static_cast<int>(random() % 60) - 40);
        for (int64_t p = 0; p < pixels; p++) at(n, c, p / s.width, p % s.width) = normal(random) * size;
      }
    weight.resize(static_cast<size_t>(s.groups * s.rows * s.channels * s.kernel_h * s.kernel_w));
    for (float& w : weight) w = normal(random);
    bias.resize(static_cast<size_t>(s.groups * s.rows));
    for (float& b : bias) b = normal(random);
    for (int64_t n = 0; n < s.images; n++)
      for (int64_t r = 0; r < s.groups * s.rows; r++)
        for (int64_t p = 0; p < g.out_h * g.out_w; p++) define(n, r, p / g.out_w, p % g.out_w);
  }

  float& at(int64_t n, int64_t c, int64_t h, int64_t w) {
    return x[static_cast<size_t>(n * g.stride_image + c * g.stride_channel + h * g.stride_row + w * g.stride_column)];
  }

  void define(int64_t n, int64_t r, int64_t h, int64_t w) {
    std::vector<float> seen;
    for (int64_t c = 0; c < s.channels; c++)
      for (int64_t i = 0; i < s.kernel_h; i++)
        for (int64_t j = 0; j < s.kernel_w; j++) {
          const int64_t row = h * s.step_h + i * s.dilation_h - s.padding_h;
          const int64_t column = w * s.step_w + j * s.dilation_w - s.padding_w;
          const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
          seen.push_back(inside ? at(n, r / s.rows * s.channels + c, row, column) : 0.0f);
        }
    float most = 0;
    for (const float value : seen) most = std::max(most, fabsf(value));
    const double scale = half(std::min(std::max(static_cast<double>(2 * most / 255), ldexp(1, -24)), 65504.0));
    double sum = bias[static_cast<size_t>(r)], size = fabs(sum);
    for (size_t k = 0; k < seen.size(); k++) {
      const float level = seen[k] / static_cast<float>(scale) + 128.0f;
      const double q = std::min(std::max(nearbyint(static_cast<double>(level)), 0.0), 255.0) - 128;
      const double product = scale * q * weight[static_cast<size_t>(r) * seen.size() + k];
      sum += product, size += fabs(product);
    }
    answer.push_back(sum), bound.push_back(size * ldexp(1, -24) * static_cast<double>(seen.size() + 3));
  }
};

std::vector<float> run(const Case& c, const fewbit_windows& g, const std::vector<float>& x, int32_t isa, int32_t threads) {
  std::vector<float> y(c.answer.size(), NAN);
  const int status = fewbit_int8_windows(&g, x.data(), FEWBIT_FLOAT32, c.s.images, c.s.groups, c.weight.data(),
                                         c.s.groups * c.s.rows, c.bias.data(), y.data(), isa, threads);
  if (status != FEWBIT_OK) failures++, printf("FAILED windows: status %d\n", status);
  return y;
}

void check(const Case& c) {
  std::vector<float> first;
  for (const int32_t isa : kIsas) {
    if (!(fewbit_caps() & isa)) continue;
    for (const int32_t threads : {1, 2}) {
      const std::vector<float> y = run(c, c.g, c.x, isa, threads);
      if (first.empty()) first = y;
      if (memcmp(y.data(), first.data(), y.size() * sizeof(float)))
        failures++, printf("FAILED windows: isa %d differs, %lld groups\n", isa, static_cast<long long>(c.s.groups));
    }
  }
  for (size_t i = 0; i < first.size(); i++)
    if (!(fabs(first[i] - c.answer[i]) <= c.bound[i])) {
      failures++;
      printf("FAILED windows of %lld groups: %g, not %g\n", static_cast<long long>(c.s.groups), first[i], c.answer[i]);
      return;
    }
}

// bfloat16 in and out is float32 rounded at the end; one NaN spoils the windows that see it.
void check_dtype(Case& c) {
  std::vector<uint16_t> narrow, y(c.answer.size());
  for (float& value : c.x) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    narrow.push_back(static_cast<uint16_t>(bits >> 16));
    bits &= 0xffff0000u;
    memcpy(&value, &bits, 4);
  }
  const std::vector<float> wide = run(c, c.g, c.x, FEWBIT_SERIAL, 1);
  fewbit_windows g = c.g;
  g.element_bytes = 2;
  const int status = fewbit_int8_windows(&g, narrow.data(), FEWBIT_BFLOAT16, c.s.images, c.s.groups, c.weight.data(),
                                         c.s.groups * c.s.rows, c.bias.data(), y.data(), FEWBIT_SERIAL, 2);
  bool same = status == FEWBIT_OK;
  for (size_t i = 0; i < y.size(); i++) {
    uint32_t bits;
    memcpy(&bits, &wide[i], 4);
    same = same && y[i] == (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  }
  if (!same) failures++, printf("FAILED windows in bfloat16\n");
  c.at(0, 0, 0, 0) = NAN;
  const std::vector<float> spoilt = run(c, c.g, c.x, FEWBIT_SERIAL, 1);
  for (size_t i = 0; i < spoilt.size(); i++)
    if (isnan(spoilt[i]) ? i >= static_cast<size_t>(c.s.rows * c.g.out_h * c.g.out_w) : spoilt[i] != wide[i])
      failures++, printf("FAILED windows: NaN spoils another window\n");
}

}  // namespace

int windows_failures() {
  std::mt19937 random(5);
  for (const Shape& shape : kShapes)
    for (const bool last : {false, true}) {
      Case c(shape, last, random);
      check(c);
      check_dtype(c);
    }
  for (size_t i = 0; i < sizeof kIsas / sizeof *kIsas; i++)
    if (fewbit_caps() & kIsas[i]) printf("windows on %s\n", kNames[i]);
  return failures;
}
