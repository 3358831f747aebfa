// SPDX-License-Identifier: Apache-2.0
// Vectors of float32 from the types that weights, keys and values are stored in, and the functions of single numbers.
// Included after a simd.h, inside one translation unit an instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/dtypes.h"
#include "core/inline.h"
#include "decode/steps.h"

namespace fewbit {
namespace {

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));

template <class V>
FEWBIT_INLINE V read(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

struct Float32 {
  static constexpr int64_t kBits = 32;
  static FEWBIT_INLINE F load(const uint8_t* p) { return fewbit::load(reinterpret_cast<const float*>(p)); }
};

struct BFloat16 {
  static constexpr int64_t kBits = 16;
  static FEWBIT_INLINE F load(const uint8_t* p) {
    return (F)(__builtin_convertvector(read<Halves>(p), Words) << 16);
  }
};

struct Float16 {
  static constexpr int64_t kBits = 16;
  static FEWBIT_INLINE F load(const uint8_t* p) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
};

// Codes plus 128.
struct Int8 {
  static constexpr int64_t kBits = 8;
  static FEWBIT_INLINE F load(const uint8_t* p) { return add(convert(load_bytes(p)), broadcast(-128.0f)); }
};

// Codes plus 8, two a byte.
struct Int4 {
  static constexpr int64_t kBits = 4;
  static FEWBIT_INLINE F load(const uint8_t* p, bool high) {
    const U bytes = load_bytes(p);
    return add(convert(mask(high ? shift_right(bytes, 4) : bytes, 15)), broadcast(-8.0f));
  }
};

// e^x for x <= 0, to about 2^-22 of itself; 0 from where e^x is below 2^-126. Cephes' way: x = n ln 2 + r, |r| <= ln 2 / 2,
// and a polynomial in r.
FEWBIT_INLINE float exp_of(float x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = (clamped * 1.44269504f + round) - round;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const float power = float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

// 1 / (1 + e^-x), from an exponential that cannot overflow.
FEWBIT_INLINE float sigmoid(float x) {
  const float e = exp_of(x < 0 ? x : -x), one = 1.0f / (1.0f + e);
  return x < 0 ? e * one : one;
}

FEWBIT_INLINE float tanh_of(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// The sum of `count` numbers, in 16 chains.
template <class Number>
FEWBIT_INLINE float sum_of(int64_t count, Number number) {
  float chain[16] = {};
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    for (int i = 0; i < 16; i++) chain[i] += number(k + i);
  for (int i = 0; k < count; k++, i++) chain[i] += number(k);
#pragma GCC unroll 4
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) chain[i] += chain[i + half];
  return chain[0];
}

FEWBIT_INLINE float sum_lanes(F x) {
  float lanes[kLanes];
  store(lanes, x);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

FEWBIT_INLINE float largest_of(F x) {
  float lanes[kLanes];
  store(lanes, x);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

}  // namespace
}  // namespace fewbit
