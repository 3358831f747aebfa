// SPDX-License-Identifier: Apache-2.0
// y = x W^T for activations rounded to int8: products of bytes, summed in int32. Included after an ISA's dot.h, which
// offers
//
//   Dot<BITS>          sums of byte * activation, four columns a lane, for bytes below 2^BITS:
//     kGroups          groups of four columns after which `flush` must be called
//     kOrigin          what the bytes are shifted down by before they are multiplied
//     add(u, x)        u: four bytes a lane; x: four activations, the same in every lane
//     flush(), value() the lanes' sums as floats
//     merge(dot)       adds another chain's sums; where kDirectChains > 1
//   direct1(BITS), kDirect2, kDirect4, kDirect8    row groups beside one, two, up to four and up to eight tokens; the
//                      last two may be 0: computed as where there are many
//   kDirectChains      sums a row group keeps beside one or two tokens
//   kMany, kManyTokens                   row groups and tokens computed together where there are many
//   planes(BITS)       2 where codes of 8 bits are multiplied as two planes of nibbles, else 1
//
// What codes stand for is said by an operand K, of which a strip makes one:
//
//   kBits, kPlanes     bits of a code; vectors that it is multiplied as
//   X                  what it takes activations as: int8_t, or int16_t where widening them once spares many times
//   Sum                a Dot, or what looks like one: the sums of one plane
//   K(task)            what is loaded once, e.g. a table in registers
//   split(codes, out)  the planes of four codes a lane
//   value(sums, sum)   the dot product of levels and activations, rounded to float32 once, of which `sum` is the sum of
//                      the activations
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
  template <class X>
  FEWBIT_INLINE const X* activations(const Int8Task& task) const {
    return static_cast<const X*>(task.activations) + token * task.chunks * 32;
  }
};

// Where segment s finds its parameters: of the weight, within a row group, and of a token's activations.
struct Segment {
  int64_t index, weight, activation;

  FEWBIT_INLINE Segment(const Int8Task& task, int64_t s)
      : index(s), weight(s / task.block_segments * 16), activation(s / task.x_block_segments) {}
};

// Codes that are their own levels, less a zero.
template <int BITS>
struct Codes {
  static constexpr int kBits = BITS, kPlanes = planes(BITS);
  using X = int8_t;
  using Sum = Dot<kPlanes == 2 ? 4 : BITS>;
  float zero;

  explicit FEWBIT_INLINE Codes(const Int8Task& task) : zero(task.zero) {}

  FEWBIT_INLINE void split(U codes, U (&plane)[kPlanes]) const {
    if constexpr (kPlanes == 1) {
      plane[0] = codes;
    } else {
      plane[0] = mask(codes, 0x0f0f0f0fu);
      plane[1] = mask(shift_right(codes, 4), 0x0f0f0f0fu);
    }
  }

  FEWBIT_INLINE F value(const Sum (&dot)[kPlanes], float sum) const {
    F codes = dot[0].value();
    if constexpr (kPlanes == 2) codes = add(codes, multiply(dot[1].value(), broadcast(16.0f)));
    return add(codes, broadcast((Sum::kOrigin - zero) * sum));
  }
};

// total += (scale * (dot of levels) + offset * sum) * x_scale, for a segment of one token.
template <class K>
FEWBIT_INLINE F settle(const Int8Task& task, const K& kernel, const Segment& s,
                       const typename K::Sum (&dot)[K::kPlanes], F scale, F offset, int64_t token, F total) {
  const float sum = task.sums[token * task.segments + s.index];
  const float x_scale = task.x_scale[token * task.x_blocks + s.activation];
  F value = multiply(scale, kernel.value(dot, sum));
  if (task.offset) value = add(value, multiply(offset, broadcast(sum)));
  return add(total, multiply(value, broadcast(x_scale)));
}

// T row groups x M tokens, decoded where they stand; C sums a row group and token, which g takes in turn.
template <class K, int T, int M, int C>
void direct(const Int8Task& task, const Int8Strip& strip) {
  constexpr int P = K::kPlanes;
  using Sum = typename K::Sum;
  const K kernel(task);
  F total[T][M];
  const uint8_t* codes[T];
  const auto* x = strip.activations<typename K::X>(task);
  for (int t = 0; t < T; t++) codes[t] = Group(task, strip.at(t)).codes;
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) total[t][m] = broadcast(0.0f);
  for (int64_t s = 0, chunk = 0; s < task.segments; s++) {
    Sum dot[C][T][M][P];
    Held<K::kBits> held[T];
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    for (; chunk < end; chunk++, x += M * 32) {
#pragma GCC unroll kUnroll
      for (int g = 0; g < 8; g++) {
        U u[T][P];
        for (int t = 0; t < T; t++) {
          held[t].advance(codes[t], g);
          kernel.split(held[t].quad(g), u[t]);
        }
        for (int m = 0; m < M; m++)
          for (int t = 0; t < T; t++)
            for (int p = 0; p < P; p++) dot[g % C][t][m][p].add(u[t][p], x + m * 32 + g * 4);
        if ((g + 1) % Sum::kGroups == 0)
          for (int t = 0; t < T; t++)
            for (int m = 0; m < M; m++)
              for (int p = 0; p < P; p++) dot[g % C][t][m][p].flush();
      }
      for (int t = 0; t < T; t++) codes[t] += K::kBits * 64;
    }
    const Segment segment(task, s);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const int64_t at = Group(task, strip.at(t)).parameters + segment.weight;
      const F scale = parameter(task.scale, task.scale_half, at);
      const F offset = task.offset ? parameter(task.offset, task.offset_half, at) : scale;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        if constexpr (C > 1)
          for (int c = 1; c < C; c++)
            for (int p = 0; p < P; p++) dot[0][t][m][p].merge(dot[c][t][m][p]);
        total[t][m] = settle(task, kernel, segment, dot[0][t][m], scale, offset, strip.token + m, total[t][m]);
      }
    }
  }
  for (int t = 0; t < T && t < strip.groups; t++)
    for (int m = 0; m < M && m < strip.tokens; m++)
      put(task, Group(task, strip.at(t)).row, strip.token + m, total[t][m]);
}

// One plane of one segment of T row groups, a byte a code: (groups of four columns, T, lanes of 4 bytes).
template <int T>
struct alignas(64) Decoded {
  uint8_t bytes[kSegment / 4][T][kLanes * 4];
};

template <class K, int T>
FEWBIT_INLINE void decode_segment(const Int8Task& task, const K& kernel, const Int8Strip& strip, int64_t first,
                                  int64_t chunks, Decoded<T> (&out)[K::kPlanes]) {
  for (int t = 0; t < T; t++) {
    const uint8_t* codes = Group(task, strip.at(t)).codes + first * K::kBits * 64;
    Held<K::kBits> held;
    for (int64_t c = 0; c < chunks; c++, codes += K::kBits * 64) {
#pragma GCC unroll 8
      for (int g = 0; g < 8; g++) {
        U plane[K::kPlanes];
        held.advance(codes, g);
        kernel.split(held.quad(g), plane);
        for (int p = 0; p < K::kPlanes; p++) store_lanes(out[p].bytes[c * 8 + g][t], plane[p]);
      }
    }
  }
}

// T row groups x M tokens of one plane of a decoded segment. The sums stay in registers as they are local.
template <class Sum, class X, int T, int M>
FEWBIT_INLINE void multiply_decoded(const Decoded<T>& decoded, int64_t chunks, const X* x, Sum (&out)[T][M]) {
  Sum dot[T][M];
  for (int64_t c = 0; c < chunks; c++, x += M * 32) {
    for (int begin = 0; begin < 8; begin += Sum::kGroups) {
      // Not unrolled: GCC would add the products up in an order that keeps all of them alive at once.
#pragma GCC unroll 1
      for (int g = begin; g < begin + Sum::kGroups; g++) {
        U u[T];
        for (int t = 0; t < T; t++) u[t] = load_lanes(decoded.bytes[c * 8 + g][t]);
        for (int m = 0; m < M; m++)
          for (int t = 0; t < T; t++) dot[t][m].add(u[t], x + m * 32 + g * 4);
      }
      for (int t = 0; t < T; t++)
        for (int m = 0; m < M; m++) dot[t][m].flush();
    }
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) out[t][m] = dot[t][m];
}

// T row groups x all tokens, M at a time: each segment is decoded once and serves every token.
template <class K, int T, int M>
void decoded_once(const Int8Task& task, int64_t group, int64_t groups, int64_t tokens) {
  constexpr int P = K::kPlanes;
  using Sum = typename K::Sum;
  const K kernel(task);
  const Int8Strip rows = {group, groups, 0, tokens};
  const int64_t padded = (tokens + M - 1) / M * M;
  float totals[kRoundedTokens][T][kLanes];
  Decoded<T> decoded[P];
  for (int64_t m = 0; m < padded; m++)
    for (int t = 0; t < T; t++) store(totals[m][t], broadcast(0.0f));
  for (int64_t s = 0; s < task.segments; s++) {
    const int64_t first = s * task.segment_chunks, left = task.chunks - first;
    const int64_t chunks = left < task.segment_chunks ? left : task.segment_chunks;
    decode_segment<K, T>(task, kernel, rows, first, chunks, decoded);
    const Segment segment(task, s);
    F scale[T], offset[T];
    for (int t = 0; t < T; t++) {
      const int64_t at = Group(task, rows.at(t)).parameters + segment.weight;
      scale[t] = parameter(task.scale, task.scale_half, at);
      offset[t] = task.offset ? parameter(task.offset, task.offset_half, at) : scale[t];
    }
    for (int64_t token = 0; token < padded; token += M) {
      Sum dot[P][T][M];
      const auto* x = rows.activations<typename K::X>(task) + (token * task.chunks + first * M) * 32;
      for (int p = 0; p < P; p++) multiply_decoded(decoded[p], chunks, x, dot[p]);
      for (int m = 0; m < M; m++)
        for (int t = 0; t < T; t++) {
          Sum here[P];
          for (int p = 0; p < P; p++) here[p] = dot[p][t][m];
          float* total = totals[token + m][t];
          store(total, settle(task, kernel, segment, here, scale[t], offset[t], token + m, load(total)));
        }
    }
  }
  for (int64_t m = 0; m < tokens; m++)
    for (int t = 0; t < T && t < groups; t++) put(task, Group(task, group + t).row, m, load(totals[m][t]));
}

// Row groups by T, for all M tokens of a task.
template <class K, int T, int M, int C>
FEWBIT_INLINE void strips_direct(const Int8Task& task, int64_t group, int64_t end, int64_t tokens) {
  for (; group < end; group += T) direct<K, T, M, C>(task, {group, end - group, 0, tokens});
}

template <class K>
void int8_strips(const Int8Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  constexpr auto share = [](int groups) { return groups > K::kPlanes ? groups / K::kPlanes : 1; };  // of the registers
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  switch (task.together) {
    case 1: return strips_direct<K, direct1(K::kBits), 1, kDirectChains>(task, begin, end, tokens);
    case 2: return strips_direct<K, kDirect2, 2, kDirectChains>(task, begin, end, tokens);
  }
  if (kDirect4 && task.together == 4 && tokens <= 4)
    return strips_direct<K, share(kDirect4), 4, 1>(task, begin, end, tokens);
  if (kDirect8 && task.together == 8 && tokens <= 8)
    return strips_direct<K, share(kDirect8), 8, 1>(task, begin, end, tokens);
  for (int64_t g = begin; g < end; g += kMany) decoded_once<K, kMany, kManyTokens>(task, g, end - g, tokens);
}

inline void int8_run(const Int8Task& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.bits) {
    case 1: return int8_strips<Codes<1>>(task, tile_begin, tile_end, tokens);
    case 2: return int8_strips<Codes<2>>(task, tile_begin, tile_end, tokens);
    case 3: return int8_strips<Codes<3>>(task, tile_begin, tile_end, tokens);
    case 4: return int8_strips<Codes<4>>(task, tile_begin, tile_end, tokens);
    case 5: return int8_strips<Codes<5>>(task, tile_begin, tile_end, tokens);
    case 6: return int8_strips<Codes<6>>(task, tile_begin, tile_end, tokens);
    case 7: return int8_strips<Codes<7>>(task, tile_begin, tile_end, tokens);
    case 8: return int8_strips<Codes<8>>(task, tile_begin, tile_end, tokens);
  }
}

}  // namespace
}  // namespace fewbit
