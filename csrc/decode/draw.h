// SPDX-License-Identifier: Apache-2.0
// What a draw does to all tokens of a vocabulary: see sample.cc. What is computed is the same everywhere, bit for bit.
// Included after a simd.h.
#pragma once

#include <math.h>
#include <string.h>

#include "decode/elements.h"

namespace fewbit {
namespace {

// e^x for x <= 0, the Taylor series to the seventh power within half a power of two; 0 below -87. Our own, so that one
// result comes from every mathematical library.
FEWBIT_INLINE F exponential(F x) {
  const F clamped = x < -87.0f ? broadcast(-87.0f) : x;
  const Words power = __builtin_convertvector(clamped * 1.44269504f - 0.5f, Words);
  const F whole = __builtin_convertvector(power, F);
  const F r = (clamped - whole * 0.693145752f) - whole * 1.42860677e-6f;  // 15 bits of ln 2: the product is exact
  F y = broadcast(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return x < -87.0f ? broadcast(0.0f) : y * (F)((power + 127) << 23);
}

// x = work(x, which of them stay whose worst companion is `last`), a vector at a time.
template <class W>
FEWBIT_INLINE void each_token(float* x, int64_t count, Candidate last, const W& work) {
  Words token;
  for (int i = 0; i < kLanes; i++) token[i] = i;
  for (int64_t i = 0; i < count; i += kLanes, token += kLanes) {
    float rest[kLanes] = {};
    const int64_t left = count - i;
    if (left < kLanes) memcpy(rest, x + i, static_cast<size_t>(left) * sizeof(float));
    float* here = left < kLanes ? rest : x + i;
    const F value = load(here);
    store(here, work(value, (value > last.value) | ((value == last.value) & (token <= last.token))));
    if (left < kLanes) memcpy(x + i, rest, static_cast<size_t>(left) * sizeof(float));
  }
}

void shares(float* x, int64_t count, float most, float temperature, Candidate last) {
  each_token(x, count, last, [=](F value, Words stays) {
    return stays ? exponential((value - most) / temperature) : broadcast(0.0f);
  });
}

void cut(float* x, int64_t count, float least, Candidate last) {
  each_token(x, count, last,
             [=](F value, Words stays) { return stays & (value >= least) ? value : broadcast(0.0f); });
}

double sum(const float* x, int64_t count) {
  constexpr int64_t chains = 16;
  double chain[chains] = {};
  const int64_t whole = count - count % chains;
  for (int64_t i = 0; i < whole; i += chains)
    for (int64_t c = 0; c < chains; c++) chain[c] += static_cast<double>(x[i + c]);
  for (int64_t i = whole; i < count; i++) chain[0] += static_cast<double>(x[i]);
  double all = 0;
  for (const double one : chain) all += one;
  return all;
}

float largest(const float* x, int64_t count) {
  constexpr int64_t together = 4;  // enough to hide the latency of a comparison
  F most[together], zero[together];  // NaN where anything was not finite
  for (int c = 0; c < together; c++) most[c] = broadcast(-INFINITY), zero[c] = broadcast(0.0f);
  int64_t i = 0;
  for (; i + together * kLanes <= count; i += together * kLanes)
    for (int c = 0; c < together; c++) {
      const F here = load(x + i + c * kLanes);
      most[c] = larger(most[c], here), zero[c] = fma(here, broadcast(0.0f), zero[c]);
    }
  for (int c = 1; c < together; c++) most[0] = larger(most[0], most[c]), zero[0] = add(zero[0], zero[c]);
  float all = largest_of(most[0]), bad = sum_lanes(zero[0]);
  for (; i < count; i++) all = x[i] > all ? x[i] : all, bad += x[i] * 0.0f;
  return all + bad;
}

}  // namespace
}  // namespace fewbit
