// SPDX-License-Identifier: Apache-2.0
// y = x W^T for signs of both: in tile16 a code of one bit makes each lane 32 columns of a row, so a chunk costs a row
// group one load, an exclusive or with the token's word of the same 32 columns, and a count of the bits that differ.
// Included after an ISA's simd.h and what its xnor_linear.cc defines:
//
//   kWords             words that a chunk takes of a token: 1, or 2 where nibbles are apart
//   Signs(codes)       32 columns of a row group, as `add` wants them; Signs() is anything
//   Count              bits that differ, of at most kMost chunks; none at first
//     add(signs, x)    one chunk more; x: the token's words
//     lanes()          as one number a row
//   sum(a, b)          of two such numbers
//   kDirect1, kDirect2, kMany    row groups beside one, two, and kManyTokens (3 or more) tokens
//
// Counts are integers, and scales are applied by one order of multiplications: the same bits everywhere.
#pragma once

#include <string.h>

#include "core/dtypes.h"
#include "core/linear.h"

namespace fewbit {
namespace {

// Scale of a token as the format sign/channel fits it: float16(clamp(mean |x|, 2^-24, 65504)), NaN where one is.
inline float mean_magnitude(const fewbit_input& source, int64_t token, int64_t count) {
  constexpr int kChains = 16;
  double chain[kChains] = {};
  float buffer[kSegment];
  for (int64_t begin = 0; begin < count; begin += kSegment) {
    const int64_t here = count - begin < kSegment ? count - begin : kSegment;
    const float* x = floats(source, token, begin, here, buffer);
    int64_t k = 0;
    for (; k + kChains <= here; k += kChains)
      for (int i = 0; i < kChains; i++) chain[i] += __builtin_fabsf(x[k + i]);
    for (; k < here; k++) chain[k % kChains] += __builtin_fabsf(x[k]);
  }
  for (int apart = kChains / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; i++) chain[i] += chain[i + apart];
  const float mean = static_cast<float>(chain[0] / static_cast<double>(count));
  const float least = 5.9604644775390625e-08f;
  return from_float16(to_float16(mean < least ? least : mean > 65504.0f ? 65504.0f : mean));
}

// What x must exceed for x / scale to be a positive float32: all but zero does, unless the quotient rounds to zero,
// which below the normal numbers x = n 2^-149 does for n <= scale / 2.
inline float least_positive(float scale) {
  return float_of(scale >= 2.0f ? static_cast<uint32_t>(scale / 2) : 0);
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

inline void sign_token(const XnorTask& task, const fewbit_input& x, int64_t token) {
  uint32_t* out = task.words + (token / task.together * task.chunks * task.together + token % task.together) * kWords;
  const bool exists = token < x.tokens;
  const float scale = exists ? mean_magnitude(x, token, task.columns) : 0.0f, least = least_positive(scale);
  task.x_scale[token] = scale / 2;
  for (int64_t c = 0; c < task.chunks; c++, out += task.together * kWords) {
    const int64_t left = task.columns - c * 32, few = left < 32 ? left : 32;
    uint32_t word = 0;
    float buffer[32], rest[32] = {};
    if (exists) {
      const float* here = floats(x, token, c * 32, few, buffer);
      if (few < 32) here = static_cast<const float*>(memcpy(rest, here, static_cast<size_t>(few) * sizeof(float)));
      word = sign_word(here, least);
    }
    out[0] = kWords == 2 ? word & 0x0f0f0f0fu : word;
    if (kWords == 2) out[kWords - 1] = word >> 4 & 0x0f0f0f0fu;
  }
}

// One row group of one token, from the bits that differ: exact until it meets the scales.
FEWBIT_INLINE void settle(const XnorTask& task, const Group& group, int64_t token, U differing) {
  const F dot = add(broadcast(static_cast<float>(task.columns)), multiply(broadcast(-2.0f), convert(differing)));
  const F scale = parameter(task.scale, task.scale_half, group.parameters);
  put(task, group.row, token, multiply(multiply(scale, broadcast(task.x_scale[token])), dot));
}

// T row groups from `group`, of which `groups` exist.
struct XnorRows {
  int64_t group, groups;

  FEWBIT_INLINE Group at(const XnorTask& task, int64_t t) const {
    return Group(task, group + (t < groups ? t : groups - 1));
  }
};

// T row groups x M tokens, the only ones; signs are used where they are loaded.
template <int T, int M>
void direct(const XnorTask& task, const XnorRows& rows, int64_t tokens) {
  const uint32_t* x = task.words;
  const uint8_t* codes[T];
  U differing[T][M];
  for (int t = 0; t < T; t++) codes[t] = rows.at(task, t).codes;
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) differing[t][m] = Count().lanes();
  for (int64_t chunk = 0; chunk < task.chunks;) {
    const int64_t end = chunk + kMost < task.chunks ? chunk + kMost : task.chunks;
    Count count[T][M];
    for (; chunk < end; chunk++, x += M * kWords) {
      for (int t = 0; t < T; t++) {
        const Signs signs(load_lanes(codes[t]));
        codes[t] += 64;
        for (int m = 0; m < M; m++) count[t][m].add(signs, x + m * kWords);
      }
    }
    for (int t = 0; t < T; t++)
      for (int m = 0; m < M; m++) differing[t][m] = sum(differing[t][m], count[t][m].lanes());
  }
  for (int t = 0; t < T && t < rows.groups; t++)
    for (int m = 0; m < M && m < tokens; m++) settle(task, rows.at(task, t), m, differing[t][m]);
}

// T row groups x all tokens, M at a time: signs are taken apart once for all of them.
template <int T, int M>
void shared(const XnorTask& task, const XnorRows& rows, int64_t tokens) {
  Signs signs[kMost][T];
  U differing[kRoundedTokens][T];
  const int64_t padded = (tokens + M - 1) / M * M;
  for (int64_t m = 0; m < padded; m++)
    for (int t = 0; t < T; t++) differing[m][t] = Count().lanes();
  for (int64_t first = 0; first < task.chunks; first += kMost) {
    const int64_t left = task.chunks - first, chunks = left < kMost ? left : kMost;
    for (int t = 0; t < T; t++) {
      const uint8_t* codes = rows.at(task, t).codes + first * 64;
      for (int64_t c = 0; c < chunks; c++) signs[c][t] = Signs(load_lanes(codes + c * 64));
    }
    for (int64_t token = 0; token < padded; token += M) {
      const uint32_t* x = task.words + (token * task.chunks + first * M) * kWords;
      Count count[T][M];
      for (int64_t c = 0; c < chunks; c++, x += M * kWords)
        for (int m = 0; m < M; m++)
          for (int t = 0; t < T; t++) count[t][m].add(signs[c][t], x + m * kWords);
      for (int m = 0; m < M; m++)
        for (int t = 0; t < T; t++) differing[token + m][t] = sum(differing[token + m][t], count[t][m].lanes());
    }
  }
  for (int64_t m = 0; m < tokens; m++)
    for (int t = 0; t < T && t < rows.groups; t++) settle(task, rows.at(task, t), m, differing[m][t]);
}

inline void xnor_run(const XnorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t end = tile_end * kGroupsPerTile;
  for (int64_t g = tile_begin * kGroupsPerTile; g < end;) {
    const XnorRows rows = {g, end - g};
    if (task.together == 1) {
      direct<kDirect1, 1>(task, rows, tokens);
      g += kDirect1;
    } else if (task.together == 2) {
      direct<kDirect2, 2>(task, rows, tokens);
      g += kDirect2;
    } else {
      shared<kMany, kManyTokens>(task, rows, tokens);
      g += kMany;
    }
  }
}

}  // namespace
}  // namespace fewbit
