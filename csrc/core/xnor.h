// SPDX-License-Identifier: Apache-2.0
// y = x W^T for signs of both: in tile16 a code of one bit makes each lane 32 columns of a row, so a chunk costs a row
// group one load, an exclusive or with the token's word of the same 32 columns, and a count of the bits that differ.
// Included after an ISA's simd.h and what its xnor_linear.cc defines:
//
//   kWords             words that a chunk takes of a token: 1, or 2 where nibbles are apart
//   Signs(codes)       32 columns of a row group, as `add` wants them
//   Count              bits that differ, of at most kMost chunks
//     add(signs, x)    one chunk more; x: the token's words
//     lanes()          as one number a row
//   sum(a, b)          of two such numbers
//   kDirect1, kDirect2, kDirectMany, kManyTokens    row groups beside one, two and kManyTokens tokens
//
// Counts are integers, and scales are applied by one order of multiplications: the same bits everywhere.
#pragma once

#include <string.h>

#include "core/linear.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

// Scale of a token as the format sign/channel fits it: float16(clamp(mean |x|, 2^-24, 65504)), NaN where one is.
inline float mean_magnitude(const float* x, int64_t count) {
  constexpr int kChains = 16;
  double chain[kChains] = {};
  int64_t k = 0;
  for (; k + kChains <= count; k += kChains)
    for (int i = 0; i < kChains; i++) chain[i] += __builtin_fabsf(x[k + i]);
  for (; k < count; k++) chain[k % kChains] += __builtin_fabsf(x[k]);
  for (int apart = kChains / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; i++) chain[i] += chain[i + apart];
  const float mean = static_cast<float>(chain[0] / static_cast<double>(count));
  return half_of(mean < 5.9604644775390625e-08f ? 5.9604644775390625e-08f : mean > 65504.0f ? 65504.0f : mean);
}

// What x must exceed for x / scale to be a positive float32: all but zero does, unless the quotient rounds to zero,
// which below the normal numbers x = n 2^-149 does for n <= scale / 2.
inline float least_positive(float scale) {
  const uint32_t bits = scale >= 2.0f ? static_cast<uint32_t>(scale / 2) : 0;
  float least;
  memcpy(&least, &bits, sizeof least);
  return least;
}

// The word of a chunk's 32 columns, laid out as a lane of tile16: bit 8 (k % 4) + k / 4 says that x[k] > least, which
// is the sign of their difference. Loops that compilers turn into vectors.
inline uint32_t sign_word(const float* x, float least) {
  uint32_t bits[32], word = 0;
  float below[32];
  for (int k = 0; k < 32; k++) below[k] = least - x[k];
  memcpy(bits, below, sizeof bits);
  for (uint32_t k = 0; k < 32; k++) word |= bits[k] >> 31 << (k % 4 * 8 + k / 4);
  return word;
}

inline void sign_token(const XnorTask& task, const float* x, int64_t token) {
  uint32_t* out = task.words + (token / task.together * task.chunks * task.together + token % task.together) * kWords;
  const float scale = x ? mean_magnitude(x, task.columns) : 0.0f, least = least_positive(scale);
  task.x_scale[token] = scale / 2;
  for (int64_t c = 0; c < task.chunks; c++, out += task.together * kWords) {
    const int64_t left = task.columns - c * 32;
    uint32_t word = 0;
    if (x && left >= 32) {
      word = sign_word(x + c * 32, least);
    } else if (x) {
      float rest[32] = {};
      memcpy(rest, x + c * 32, static_cast<size_t>(left) * sizeof(float));
      word = sign_word(rest, least);
    }
    out[0] = kWords == 2 ? word & 0x0f0f0f0fu : word;
    if (kWords == 2) out[kWords - 1] = word >> 4 & 0x0f0f0f0fu;
  }
}

// T row groups from `group`, of which `groups` exist, x M tokens from `token`, of which `tokens` do.
template <int T, int M>
void count_signs(const XnorTask& task, int64_t group, int64_t groups, int64_t token, int64_t tokens) {
  const auto at = [&](int64_t t) { return Group(task, group + (t < groups ? t : groups - 1)); };
  const uint32_t* x = task.words + token * task.chunks * kWords;
  const uint8_t* codes[T];
  U differing[T][M];
  for (int t = 0; t < T; t++) codes[t] = at(t).codes;
  for (int64_t chunk = 0; chunk < task.chunks;) {
    const int64_t end = chunk + kMost < task.chunks ? chunk + kMost : task.chunks;
    const bool first = chunk == 0;
    Count count[T][M];
    for (; chunk < end; chunk++, x += M * kWords) {
      for (int t = 0; t < T; t++) {
        const Signs signs(load_lanes(codes[t]));
        codes[t] += 64;
        for (int m = 0; m < M; m++) count[t][m].add(signs, x + m * kWords);
      }
    }
    for (int t = 0; t < T; t++)
      for (int m = 0; m < M; m++) differing[t][m] = first ? count[t][m].lanes() : sum(differing[t][m], count[t][m].lanes());
  }
  const F columns = broadcast(static_cast<float>(task.columns));
  for (int t = 0; t < T && t < groups; t++) {
    const Group here = at(t);
    const F scale = parameter(task.scale, task.scale_half, here.parameters);
    for (int m = 0; m < M && m < tokens; m++) {
      const F dot = add(columns, multiply(broadcast(-2.0f), convert(differing[t][m])));
      put(task, here.row, token + m, multiply(multiply(scale, broadcast(task.x_scale[token + m])), dot));
    }
  }
}

template <int T, int M>
void count_tiles(const XnorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t end = tile_end * kGroupsPerTile;
  for (int64_t g = tile_begin * kGroupsPerTile; g < end; g += T)
    for (int64_t token = 0; token < tokens; token += M) count_signs<T, M>(task, g, end - g, token, tokens - token);
}

inline void xnor_run(const XnorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.together) {
    case 1: return count_tiles<kDirect1, 1>(task, tile_begin, tile_end, tokens);
    case 2: return count_tiles<kDirect2, 2>(task, tile_begin, tile_end, tokens);
    default: return count_tiles<kDirectMany, kManyTokens>(task, tile_begin, tile_end, tokens);
  }
}

}  // namespace
}  // namespace fewbit
