// SPDX-License-Identifier: Apache-2.0
// Steps on single tokens: norms, rotations, gates, softmax, and products with matrices that are not quantized. Included
// after a simd.h.
#pragma once

#include <math.h>

#include "decode/elements.h"

namespace fewbit {
namespace {

void norm(const float* x, const float* weight, float eps, int64_t count, float* out) {
  const float mean = sum_of(count, [=](int64_t i) { return x[i] * x[i]; }) / static_cast<float>(count);
  const float factor = 1.0f / sqrtf(mean + eps);
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * factor * weight[i];
}

void add_to(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i++) x[i] += y[i];
}

void add_share(float* x, float share, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i++) x[i] += share * y[i];
}

void rotate(float* x, int64_t pairs, const float* cos, const float* sin) {
  for (int64_t i = 0; i < pairs; i++) {
    const float a = x[i], b = x[i + pairs];
    x[i] = a * cos[i] - b * sin[i];
    x[i + pairs] = b * cos[i] + a * sin[i];
  }
}

void gate(int32_t activation, const float* gates, const float* up, int64_t count, float* out) {
  if (activation == FEWBIT_SILU) {
    each_of(gates, up, count, out, [](F g, F u) { return g * sigmoid(g) * u; });
  } else if (activation == FEWBIT_GELU_TANH) {  // (1 + tanh(v)) / 2 = sigmoid(2 v)
    each_of(gates, up, count, out, [](F g, F u) {
      const F v = 0.7978845608f * (g + 0.044715f * g * g * g);
      return g * sigmoid(2.0f * v) * u;
    });
  } else {
    for (int64_t i = 0; i < count; i++) out[i] = 0.5f * gates[i] * (1.0f + erff(gates[i] * 0.70710678f)) * up[i];
  }
}

void cap_to(float* x, float scale, float cap, int64_t count) {
  if (cap == 0.0f)
    for (int64_t i = 0; i < count; i++) x[i] *= scale;
  else
    each_of(x, x, count, x, [=](F here, F) { return cap * tanh_of(here * scale / cap); });
}

void hadamard(float* x, int64_t block, int64_t count) {
  for (int64_t apart = 1; apart < block; apart *= 2)
    for (int64_t first = 0; first < count; first += 2 * apart) {
      float *low = x + first, *high = low + apart;
      for (int64_t i = 0; i < apart; i++) {
        const float a = low[i], b = high[i];
        low[i] = a + b, high[i] = a - b;
      }
    }
}

// R neighbouring outputs, kLanes places of a block.
template <int R>
FEWBIT_INLINE void mix_tile(const float* x, const float* matrix, int64_t order, int64_t block, float* out) {
  F sum[R];
  for (int r = 0; r < R; r++) sum[r] = broadcast(0.0f);
  for (int64_t from = 0; from < order; from++) {
    const F values = load(x + from * block);
    for (int r = 0; r < R; r++) sum[r] = fma(broadcast(matrix[from * order + r]), values, sum[r]);
  }
  for (int r = 0; r < R; r++) store(out + r * block, sum[r]);
}

void mix(const float* x, const float* matrix, int64_t order, int64_t block, float* out) {
  int64_t to = 0;
  for (; to + 4 <= order && block % kLanes == 0; to += 4)
    for (int64_t i = 0; i < block; i += kLanes) mix_tile<4>(x + i, matrix + to, order, block, out + to * block + i);
  for (; to < order; to++)
    for (int64_t i = 0; i < block; i++) {
      float sum = 0.0f;
      for (int64_t from = 0; from < order; from++) sum += matrix[from * order + to] * x[from * block + i];
      out[to * block + i] = sum;
    }
}

void scale_by(const float* x, const float* factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * factor[i];
}

// Scale and zero of one block.
struct Grid {
  float scale, zero;
};

Grid grid_of(const fewbit_rounding& rounding, const float* x, int64_t count) {
  const float top = static_cast<float>((1 << rounding.bits) - 1), least = 5.9604644775390625e-08f;
  int32_t bits = 0;  // of the largest magnitude
  float low = 0.0f, high = 0.0f;
  for (int64_t i = 0; i < count; i++) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu);
    bits = bits > magnitude ? bits : magnitude;
    low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
  }
  if (rounding.scale != 0.0f)
    return {bits < 0x7f800000 ? rounding.scale : NAN, static_cast<float>(rounding.zero)};
  const float clip = rounding.clip, most = float_of(static_cast<uint32_t>(bits));
  const float wide = rounding.symmetric ? 2.0f * clip * most / top : (clip * high - clip * low) / top;
  const float clamped = wide < least ? least : wide > 65504.0f ? 65504.0f : wide;
  const float scale = bits < 0x7f800000 ? from_float16(to_float16(clamped)) : NAN;
  if (rounding.symmetric) return {scale, static_cast<float>(1 << (rounding.bits - 1))};
  const float zero = nearbyintf(-(clip * low) / scale);
  return {scale, zero < top ? zero : top};
}

// Between 0 and `top` before it is rounded, a quotient is small enough to be rounded by adding 1.5 * 2^23.
void round_to(const fewbit_rounding& rounding, const float* x, int64_t count, float* out) {
  const float top = static_cast<float>((1 << rounding.bits) - 1), round = 12582912.0f;
  for (int64_t first = 0; first < count; first += rounding.block) {
    const int64_t last = count - first < rounding.block ? count : first + rounding.block;
    const Grid grid = grid_of(rounding, x + first, last - first);
    for (int64_t i = first; i < last; i++) {
      float code = x[i] / grid.scale + grid.zero;
      code = code > 0.0f ? code : 0.0f;
      code = code < top ? code : top;
      out[i] = grid.scale * (code + round - round - grid.zero);
    }
  }
}

bool split_at(const float* x, float threshold, int64_t count, float* small, float* large) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; i++) {
    const bool is_large = fabsf(x[i]) >= threshold;
    found |= is_large;
    large[i] = is_large ? x[i] : 0.0f;
    small[i] = is_large ? 0.0f : x[i];
  }
  return found != 0;
}

void softmax(float* x, int64_t count) {
  float most = x[0];
  for (int64_t i = 1; i < count; i++) most = x[i] > most ? x[i] : most;
  each_of(x, x, count, x, [=](F here, F) { return exp_of(here - most); });
  const float total = sum_of(count, [=](int64_t i) { return x[i]; });
  for (int64_t i = 0; i < count; i++) x[i] /= total;
}

// R rows times M tokens; each result is one chain of vectors, whatever R and M are.
template <class E, int R, int M>
FEWBIT_INLINE void dense_tile(const DenseTask& task, int64_t row, int64_t rows, int64_t token) {
  constexpr int64_t bytes = E::kBits / 8;
  const uint8_t* w[R];
  const float* x[M];
  F total[R][M];
  for (int r = 0; r < R; r++)
    w[r] = static_cast<const uint8_t*>(task.weight) + (row + (r < rows ? r : 0)) * task.columns * bytes;
  for (int m = 0; m < M; m++) x[m] = task.x + (token + m) * task.x_stride;
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) total[r][m] = broadcast(0.0f);
  int64_t column = 0;
  for (; column + kLanes <= task.columns; column += kLanes) {
    F values[M];
    for (int m = 0; m < M; m++) values[m] = load(x[m] + column);
    for (int r = 0; r < R; r++) {
      const F weights = E::load(w[r] + column * bytes);
      for (int m = 0; m < M; m++) total[r][m] = fma(weights, values[m], total[r][m]);
    }
  }
  if (column < task.columns) {
    const int64_t few = task.columns - column;
    for (int r = 0; r < R; r++) {
      uint8_t rest[kLanes * 4] = {};
      memcpy(rest, w[r] + column * bytes, static_cast<size_t>(few * bytes));
      const F weights = E::load(rest);
      for (int m = 0; m < M; m++) {
        float values[kLanes] = {};
        memcpy(values, x[m] + column, static_cast<size_t>(few) * sizeof(float));
        total[r][m] = fma(weights, load(values), total[r][m]);
      }
    }
  }
  for (int r = 0; r < R && r < rows; r++)
    for (int m = 0; m < M; m++)
      task.y[(token + m) * task.y_stride + row + r] = sum_lanes(total[r][m]) + (task.bias ? task.bias[row + r] : 0.0f);
}

template <class E>
void dense_rows(const DenseTask& task, int64_t begin, int64_t end) {
  int64_t token = 0;
  for (; token + 4 <= task.tokens; token += 4)
    for (int64_t row = begin; row < end; row += 4) dense_tile<E, 4, 4>(task, row, end - row, token);
  for (; token < task.tokens; token++)
    for (int64_t row = begin; row < end; row += 8) dense_tile<E, 8, 1>(task, row, end - row, token);
}

void dense(const DenseTask& task, int64_t begin, int64_t end) {
  if (task.dtype == FEWBIT_FLOAT32) dense_rows<Float32>(task, begin, end);
  else if (task.dtype == FEWBIT_BFLOAT16) dense_rows<BFloat16>(task, begin, end);
  else dense_rows<Float16>(task, begin, end);
}

}  // namespace
}  // namespace fewbit
