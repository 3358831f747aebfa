// SPDX-License-Identifier: Apache-2.0
// Activations in the three dtypes, read as float32, and results written in them. Plain loops that compilers turn into
// the vectors of the file that includes this; in an unnamed namespace: every file has its own.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/inline.h"
#include "fewbit.h"

namespace fewbit {
namespace {

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// The exponent is rebiased by 112, by as much again for infinity and NaN. A subnormal half gets the exponent of the least
// normal one, which is then subtracted: no subnormal float appears, so that the result does not depend on how the
// processor treats those.
inline float from_float16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu, subnormal = magnitude < 0x0400u ? 0x00800000u : 0u;
  const uint32_t special = magnitude >= 0x7c00u ? 0x38000000u : 0u;
  const float value = float_of((magnitude << 13) + 0x38000000u + subnormal + special) -
                      float_of(subnormal ? 0x38800000u : 0u);
  return float_of(bits_of(value) | (x & 0x8000u) << 16);
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// The same; from 65520 on infinity. Halves below 2^-14 are multiples of 2^-24, to which adding 0.5 rounds.
inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x477ff000u ? large : magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

inline int64_t bytes_of(int32_t dtype) { return dtype == FEWBIT_FLOAT32 ? 4 : 2; }

// `count` elements from `at`, a step apart, as float32, into `buffer`, which it returns. A call of its own: inlined wherever
// activations are read, its three loops would be most of the code.
FEWBIT_APART inline const float* converted(const fewbit_input& x, int64_t at, int64_t count, float* buffer) {
  const auto* here = static_cast<const uint16_t*>(x.data) + at;
  const int64_t step = x.step;
  if (x.dtype == FEWBIT_FLOAT32)
    for (int64_t k = 0; k < count; k++) buffer[k] = static_cast<const float*>(x.data)[at + k * step];
  else if (x.dtype == FEWBIT_BFLOAT16)
    for (int64_t k = 0; k < count; k++) buffer[k] = from_bfloat16(here[k * step]);
  else
    for (int64_t k = 0; k < count; k++) buffer[k] = from_float16(here[k * step]);
  return buffer;
}

// Columns [first, first + count) of a token as float32: where they stand, or converted into `buffer`.
inline const float* floats(const fewbit_input& x, int64_t token, int64_t first, int64_t count, float* buffer) {
  const int64_t at = token * x.stride + first * x.step;
  if (x.dtype == FEWBIT_FLOAT32 && x.step == 1) return static_cast<const float*>(x.data) + at;
  return converted(x, at, count, buffer);
}

// Element `at` of y becomes x.
inline void write_float(void* y, int32_t dtype, int64_t at, float x) {
  if (dtype == FEWBIT_FLOAT32) static_cast<float*>(y)[at] = x;
  else static_cast<uint16_t*>(y)[at] = dtype == FEWBIT_BFLOAT16 ? to_bfloat16(x) : to_float16(x);
}

}  // namespace
}  // namespace fewbit
