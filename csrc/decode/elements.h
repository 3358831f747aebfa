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

// e^x for x <= 0, to about 2^-23 of itself; 0 from where e^x is below 2^-126. Cephes' way: x = n ln 2 + r, |r| <= ln 2 / 2,
// and a polynomial in r, by halves (Estrin's scheme): its latency is what counts.
FEWBIT_INLINE F exp_of(F x) {
  const F round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the lowest bits hold
  const F clamped = larger(broadcast(-87.0f), x), sum = fma(clamped, broadcast(1.44269504f), round), n = sum - round;
  const F r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), clamped)), square = r * r;
  const F last = fma(broadcast(1.9875691500e-4f), r, broadcast(1.3981999507e-3f));
  const F middle = fma(broadcast(8.3334519073e-3f), r, broadcast(4.1665795894e-2f));
  const F first = fma(broadcast(1.6666665459e-1f), r, broadcast(5.0000001201e-1f));
  const F p = fma(fma(fma(last, square, middle), square, first), square, r + 1.0f);
  const F power = (F)(((Words)sum + 127) << 23);
  return x < -87.0f ? broadcast(0.0f) : p * power;
}

FEWBIT_INLINE float exp_of(float x) {
  float lanes[kLanes];
  store(lanes, exp_of(broadcast(x)));
  return lanes[0];
}

// 1 / (1 + e^-x), from an exponential that cannot overflow.
FEWBIT_INLINE F sigmoid(F x) {
  const F e = exp_of(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

FEWBIT_INLINE F tanh_of(F x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// out[i] = work(x[i], y[i]), a vector at a time; out may be x or y.
template <class W>
FEWBIT_INLINE void each_of(const float* x, const float* y, int64_t count, float* out, const W& work) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, work(load(x + i), load(y + i)));
  if (i == count) return;
  const auto few = static_cast<size_t>(count - i) * sizeof(float);
  float rest[2][kLanes] = {};
  memcpy(rest[0], x + i, few), memcpy(rest[1], y + i, few);
  store(rest[0], work(load(rest[0]), load(rest[1])));
  memcpy(out + i, rest[0], few);
}

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
