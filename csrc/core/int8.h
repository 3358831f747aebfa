// SPDX-License-Identifier: Apache-2.0
// y = x W^T for affine codes and activations rounded to int8: products of bytes, summed in int32. Included after an
// ISA's simd.h and its dot.h, which offers
//
//   Dot<BITS>          sums of code * activation, four columns a lane:
//     kGroups          groups of four columns after which `flush` must be called
//     kOrigin          what the codes are shifted down by before they are multiplied
//     add(u, x)        u: four codes a lane; x: four activations, the same in every lane
//     flush(), value() the lanes' sums as floats
//   kDirect1, kDirect2, kDirectChains    row groups beside one and two tokens, and sums a row group keeps then
//   many(BITS), kManyTokens              row groups and tokens computed together where there are many
//   planes(BITS)       2 where codes of 8 bits are then decoded to two planes of nibbles, else 1
//
// What is computed is the same everywhere, bit for bit: sums are exact integers, and scales are applied by separate
// multiplications and additions in one order.
#pragma once

#include <string.h>

#include "core/linear.h"

namespace fewbit {
namespace {

// The vectors of a chunk that hold its columns 4g .. 4g+3, one for each part of a code. Going through g in order, each
// is loaded once and stays in a register.
template <int BITS>
struct Held {
  U part[part_count(BITS)];

  FEWBIT_INLINE void advance(const uint8_t* codes, int g) {
    for (int p = 0; p < part_count(BITS); p++) {
      const int width = part_width(BITS, p);
      if (g * width % 8) continue;
      part[p] = load_lanes(codes + (part_base(BITS, p) + g * width / 8) * 64);
      keep(part[p]);
    }
  }

  // Codes of columns 4g .. 4g+3, one a byte.
  FEWBIT_INLINE U quad(int g) const {
    if constexpr (BITS == 8) {
      return part[0];
    } else {
      U code = field(0, g);
      for (int p = 1; p < part_count(BITS); p++) code = combine(code, field(p, g));
      return code;
    }
  }

  // What part p contributes: shifted to where it belongs in the code, anything else masked off.
  FEWBIT_INLINE U field(int p, int g) const {
    const int width = part_width(BITS, p), base = part_base(BITS, p), at = g * width % 8;
    const U moved = at > base ? shift_right(part[p], at - base) : at < base ? shift_left(part[p], base - at) : part[p];
    return mask(moved, 0x01010101u * (((1u << width) - 1) << base));
  }
};

// Tokens from `token`, computed together, of which `tokens` exist.
struct Int8Strip {
  int64_t group, groups, token, tokens;

  FEWBIT_INLINE int64_t at(int64_t t) const { return group + (t < groups ? t : groups - 1); }
  FEWBIT_INLINE const int8_t* activations(const Int8Task& task) const {
    return task.activations + token * task.chunks * 32;
  }
};

// Where segment s finds its parameters: of the weight, within a row group, and of a token's activations.
struct Segment {
  int64_t index, weight, activation;

  FEWBIT_INLINE Segment(const Int8Task& task, int64_t s)
      : index(s), weight(s / task.block_segments * 16), activation(s / task.x_block_segments) {}
};

// total += (scale * (dot - zero * sum) + offset * sum) * x_scale, for a segment of one token.
FEWBIT_INLINE F settle(const Int8Task& task, const Segment& s, F dot, F scale, F offset, int64_t token, float origin,
                       F total) {
  const float sum = task.sums[token * task.segments + s.index];
  const float x_scale = task.x_scale[token * task.x_blocks + s.activation];
  F value = multiply(scale, add(dot, broadcast((origin - task.zero) * sum)));
  if (task.offset) value = add(value, multiply(offset, broadcast(sum)));
  return add(total, multiply(value, broadcast(x_scale)));
}

// T row groups x M tokens, decoded where they stand.
template <int BITS, int T, int M>
void direct(const Int8Task& task, const Int8Strip& strip) {
  F total[T][M];
  const uint8_t* codes[T];
  const int8_t* x = strip.activations(task);
  for (int t = 0; t < T; t++) codes[t] = Group(task, strip.at(t)).codes;
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) total[t][m] = broadcast(0.0f);
  for (int64_t s = 0, chunk = 0; s < task.segments; s++) {
    Dot<BITS> dot[kDirectChains][T][M];
    Held<BITS> held[T];
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    for (; chunk < end; chunk++, x += M * 32) {
#pragma GCC unroll kUnroll
      for (int g = 0; g < 8; g++) {
        U u[T];
        for (int t = 0; t < T; t++) {
          held[t].advance(codes[t], g);
          u[t] = held[t].quad(g);
        }
        for (int m = 0; m < M; m++)
          for (int t = 0; t < T; t++) dot[g % kDirectChains][t][m].add(u[t], x + m * 32 + g * 4);
        if ((g + 1) % Dot<BITS>::kGroups == 0)
          for (int t = 0; t < T; t++)
            for (int m = 0; m < M; m++) dot[g % kDirectChains][t][m].flush();
      }
      for (int t = 0; t < T; t++) codes[t] += BITS * 64;
    }
    const Segment segment(task, s);
    for (int t = 0; t < T; t++) {
      const int64_t at = Group(task, strip.at(t)).parameters + segment.weight;
      const F scale = parameter(task.scale, task.scale_half, at);
      const F offset = task.offset ? parameter(task.offset, task.offset_half, at) : scale;
      for (int m = 0; m < M; m++) {
        F sum = dot[0][t][m].value();
        for (int c = 1; c < kDirectChains; c++) sum = add(sum, dot[c][t][m].value());
        total[t][m] = settle(task, segment, sum, scale, offset, strip.token + m, Dot<BITS>::kOrigin, total[t][m]);
      }
    }
  }
  for (int t = 0; t < T && t < strip.groups; t++)
    for (int m = 0; m < M && m < strip.tokens; m++)
      put(task, Group(task, strip.at(t)).row, strip.token + m, total[t][m]);
}

// Codes of one segment of T row groups, a byte each: (groups of four columns, T, lanes of 4 bytes).
template <int T>
struct alignas(64) Decoded {
  uint8_t bytes[kSegment / 4][T][kLanes * 4];
};

template <int BITS, int T>
FEWBIT_INLINE void decode_segment(const Int8Task& task, const Int8Strip& strip, int64_t first, int64_t chunks,
                                  Decoded<T> (&out)[planes(BITS)]) {
  for (int t = 0; t < T; t++) {
    const uint8_t* codes = Group(task, strip.at(t)).codes + first * BITS * 64;
    Held<BITS> held;
    for (int64_t c = 0; c < chunks; c++, codes += BITS * 64) {
#pragma GCC unroll 8
      for (int g = 0; g < 8; g++) {
        held.advance(codes, g);
        const U codes_here = held.quad(g);
        if constexpr (planes(BITS) == 1) {
          store_lanes(out[0].bytes[c * 8 + g][t], codes_here);
        } else {
          store_lanes(out[0].bytes[c * 8 + g][t], mask(codes_here, 0x0f0f0f0fu));
          store_lanes(out[1].bytes[c * 8 + g][t], mask(shift_right(codes_here, 4), 0x0f0f0f0fu));
        }
      }
    }
  }
}

// T row groups x M tokens of a decoded segment.
template <int BITS, int T, int M>
FEWBIT_INLINE void multiply_decoded(const Decoded<T>& decoded, int64_t chunks, const int8_t* x,
                                    Dot<BITS> (&dot)[T][M]) {
  constexpr int kGroups = Dot<BITS>::kGroups;
  for (int64_t c = 0; c < chunks; c++, x += M * 32) {
    for (int begin = 0; begin < 8; begin += kGroups) {
      // Not unrolled: GCC would add the products up in an order that keeps all of them alive at once.
#pragma GCC unroll 1
      for (int g = begin; g < begin + kGroups; g++) {
        U u[T];
        for (int t = 0; t < T; t++) u[t] = load_lanes(decoded.bytes[c * 8 + g][t]);
        for (int m = 0; m < M; m++)
          for (int t = 0; t < T; t++) dot[t][m].add(u[t], x + m * 32 + g * 4);
      }
      for (int t = 0; t < T; t++)
        for (int m = 0; m < M; m++) dot[t][m].flush();
    }
  }
}

// T row groups x all tokens, M at a time: each segment is decoded once and serves every token.
template <int BITS, int T, int M>
void decoded_once(const Int8Task& task, int64_t group, int64_t groups, int64_t tokens) {
  const Int8Strip rows = {group, groups, 0, tokens};
  const int64_t padded = (tokens + M - 1) / M * M;
  float totals[kInt8Tokens][T][kLanes];
  constexpr int kPlanes = planes(BITS), kBits = kPlanes == 2 ? 4 : BITS;
  Decoded<T> decoded[kPlanes];
  for (int64_t m = 0; m < padded; m++)
    for (int t = 0; t < T; t++) store(totals[m][t], broadcast(0.0f));
  for (int64_t s = 0; s < task.segments; s++) {
    const int64_t first = s * task.segment_chunks, left = task.chunks - first;
    const int64_t chunks = left < task.segment_chunks ? left : task.segment_chunks;
    decode_segment<BITS, T>(task, rows, first, chunks, decoded);
    const Segment segment(task, s);
    F scale[T], offset[T];
    for (int t = 0; t < T; t++) {
      const int64_t at = Group(task, rows.at(t)).parameters + segment.weight;
      scale[t] = parameter(task.scale, task.scale_half, at);
      offset[t] = task.offset ? parameter(task.offset, task.offset_half, at) : scale[t];
    }
    for (int64_t token = 0; token < padded; token += M) {
      Dot<kBits> dot[kPlanes][T][M];
      const int8_t* x = task.activations + (token * task.chunks + first * M) * 32;
      for (int p = 0; p < kPlanes; p++) multiply_decoded<kBits, T, M>(decoded[p], chunks, x, dot[p]);
      for (int m = 0; m < M; m++)
        for (int t = 0; t < T; t++) {
          F sum = dot[0][t][m].value();
          if (kPlanes == 2) sum = add(sum, multiply(dot[kPlanes - 1][t][m].value(), broadcast(16.0f)));
          float* total = totals[token + m][t];
          store(total, settle(task, segment, sum, scale[t], offset[t], token + m, Dot<kBits>::kOrigin, load(total)));
        }
    }
  }
  for (int64_t m = 0; m < tokens; m++)
    for (int t = 0; t < T && t < groups; t++) put(task, Group(task, group + t).row, m, load(totals[m][t]));
}

template <int BITS>
void int8_bits(const Int8Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t end = tile_end * kGroupsPerTile;
  for (int64_t g = tile_begin * kGroupsPerTile; g < end;) {
    if (task.together == 1) {
      direct<BITS, kDirect1, 1>(task, {g, end - g, 0, tokens});
      g += kDirect1;
    } else if (task.together == 2) {
      direct<BITS, kDirect2, 2>(task, {g, end - g, 0, tokens});
      g += kDirect2;
    } else {
      decoded_once<BITS, many(BITS), kManyTokens>(task, g, end - g, tokens);
      g += many(BITS);
    }
  }
}

inline void int8_run(const Int8Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.bits) {
    case 1: return int8_bits<1>(task, tile_begin, tile_end, tokens);
    case 2: return int8_bits<2>(task, tile_begin, tile_end, tokens);
    case 3: return int8_bits<3>(task, tile_begin, tile_end, tokens);
    case 4: return int8_bits<4>(task, tile_begin, tile_end, tokens);
    case 5: return int8_bits<5>(task, tile_begin, tile_end, tokens);
    case 6: return int8_bits<6>(task, tile_begin, tile_end, tokens);
    case 7: return int8_bits<7>(task, tile_begin, tile_end, tokens);
    case 8: return int8_bits<8>(task, tile_begin, tile_end, tokens);
  }
}

}  // namespace
}  // namespace fewbit
