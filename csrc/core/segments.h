// SPDX-License-Identifier: Apache-2.0
// Products that are summed segment by segment, of levels and of what activations were made into. Included after an ISA's
// simd.h. What codes stand for is said by an operand K, of which a strip makes one:
//
//   kBits, kPlanes     bits of a code; vectors that it is multiplied as
//   X                  what it takes activations as
//   kApart             what of a plane's four activations lies before those of the next; 0: all take the same
//   kFields            fields of a byte that are multiplied where they stand, by `in_place(part, g)`; 1: none
//   Sum                the sums of one plane:
//     kGroups          groups of four columns after which `flush` must be called
//     add(u, x)        u: a plane of four columns; x: activations
//     begin(integer)   adds an integer to every lane, before or after products; given as floats
//     flush()
//     merge(sum, bits) adds another's, divided by 2^bits; where a row group keeps more than one
//     add_once(u, x)   add, where no other sum takes these activations; where there are fields
//   K(task)            what is loaded once, e.g. a table in registers
//   split(codes, out)  the planes of four codes a lane
//   step, origin       a level is step * (what is multiplied + origin)
//   kBegins            the plane whose sums begin at origin * (sum of the activations), by `begin`; -1: none
//   value(sums)        the dot product of what is multiplied and activations, and what they begin with
#pragma once

#include <string.h>

#include <type_traits>

#include "core/linear.h"

namespace fewbit {
namespace {

constexpr int64_t kShortRun = 24 * 1024;     // bytes of a tile
constexpr int64_t kAheadApart = 1024;        // bytes that are fetched ahead where tiles lie apart
constexpr int64_t kPart = kSegment / 32;     // chunks that are multiplied by many tokens at a time

// Whether codes of an operand lie in halves16, not in tile16.
template <class K, class = void>
constexpr bool kInHalves = false;
template <class K>
constexpr bool kInHalves<K, std::void_t<decltype(K::kHalves)>> = K::kHalves;

// The vectors of a chunk that hold its columns 4g .. 4g+3, one for each part of a code. Going through g in order, each
// is loaded once and stays in a register. An instruction set that has HALVES brings them itself.
template <int BITS, bool HALVES = false>
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

  // Flips bits of what `advance` has just loaded.
  FEWBIT_INLINE void flip_new(uint32_t bits, int g) {
    for (int p = 0; p < part_count(BITS); p++)
      if (g * part_width(BITS, p) % 8 == 0) part[p] = flip(part[p], bits);
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

// The same of a chunk at `codes`, g being what only a running kernel knows.
template <int BITS, bool HALVES = false>
FEWBIT_INLINE U quad_at(const uint8_t* codes, int g) {
  U code = repeat(0);
  for (int p = 0; p < part_count(BITS); p++) {
    const int width = part_width(BITS, p), base = part_base(BITS, p);
    const U field = shift_right(load_lanes(codes + (base + g * width / 8) * 64), g * width % 8);
    code = combine(code, shift_left(mask(field, 0x01010101u * ((1u << width) - 1)), base));
  }
  return code;
}

template <class X>
FEWBIT_INLINE const X* activations_of(const SegmentTask& task, const Strip& strip) {
  return static_cast<const X*>(task.activations) + strip.token * task.chunks * 32;
}

// How far ahead of a strip of `groups` row groups beside one another the next one lies, where that is worth fetching
// early; else 0. Processors fetch a long run of memory by themselves, but learn of a short one when it is half over.
FEWBIT_INLINE int64_t next_strip(const SegmentTask& task, int64_t groups) {
  const int64_t bytes = task.chunks * task.bits * 64;
  return bytes <= kShortRun ? groups / kGroupsPerTile * bytes : 0;
}

// `bits` lines of memory, into the second-level cache.
template <int bits>
FEWBIT_INLINE void prefetch(const uint8_t* codes) {
  for (int i = 0; i < bits; i++) __builtin_prefetch(codes + i * 64, 0, 2);
}

// A segment, and where it finds its parameters: of the weight, within a row group, and of a token's activations.
struct Segment {
  int64_t index = 0, weight = 0, activation = 0;
  int64_t weight_left, activation_left;  // segments that share them, with this one

  explicit FEWBIT_INLINE Segment(const SegmentTask& task)
      : weight_left(task.block_segments), activation_left(task.x_block_segments) {}

  // The next one: counted, since dividing takes as long as two chunks.
  FEWBIT_INLINE void advance(const SegmentTask& task) {
    index++;
    if (--weight_left == 0) weight += 16, weight_left = task.block_segments;
    if (--activation_left == 0) activation++, activation_left = task.x_block_segments;
  }
};

// What a row group's levels are multiplied by in one segment, and what is added to them: offset - scale * zero.
struct Line {
  F scale, shift;

  FEWBIT_INLINE Line() = default;
  FEWBIT_INLINE Line(const SegmentTask& task, float step, int64_t at)
      : scale(multiply(parameter(task.scale, task.scale_half, at), broadcast(step))) {
    const F zero = broadcast(-task.zero);
    shift = task.offset ? fused(scale, zero, parameter(task.offset, task.offset_half, at)) : multiply(scale, zero);
  }
};

// The segment of M tokens that are computed together: the sums of their activations, and their scales.
template <int M>
struct Tokens {
  const float *sum, *scale;
  int64_t apart;  // of two tokens' scales

  FEWBIT_INLINE Tokens(const SegmentTask& task, const Segment& s, int64_t token)
      : sum(task.sums + token * task.segments + s.index * M), scale(task.x_scale + token * task.x_blocks + s.activation),
        apart(task.x_blocks) {}
};

// total += scale * value + shift * sum, for a segment of one token with `value` the dot product of levels and `sum` that of
// the activations; times x_scale, where a token has several. kPartly: total += value, of a part of the only segment.
enum Settling { kPlain, kShifted, kScaled, kScaledShifted, kPartly };

FEWBIT_INLINE Settling settling(const SegmentTask& task) {
  if (task.x_blocks > 1) return task.shifted ? kScaledShifted : kScaled;
  return task.shifted ? kShifted : kPlain;
}

template <Settling how, int M>
FEWBIT_INLINE F settle(const Tokens<M>& tokens, int m, F value, const Line& line, F total) {
  if constexpr (how == kPartly) return add(total, value);
  if constexpr (how == kScaled || how == kScaledShifted) {
    F here = multiply(line.scale, value);
    if constexpr (how == kScaledShifted) here = fused(line.shift, broadcast(tokens.sum[m]), here);
    return fused(here, broadcast(tokens.scale[m * tokens.apart]), total);
  }
  total = fused(line.scale, value, total);
  return how == kShifted ? fused(line.shift, broadcast(tokens.sum[m]), total) : total;
}

template <int M>
FEWBIT_INLINE F settle(Settling how, const Tokens<M>& tokens, int m, F value, const Line& line, F total) {
  switch (how) {
    case kPlain: return settle<kPlain>(tokens, m, value, line, total);
    case kShifted: return settle<kShifted>(tokens, m, value, line, total);
    case kScaled: return settle<kScaled>(tokens, m, value, line, total);
    case kScaledShifted: return settle<kScaledShifted>(tokens, m, value, line, total);
    default: return settle<kPartly>(tokens, m, value, line, total);
  }
}

// A row group, whose segments have been settled, of up to M rows of activations from `first`, of which `count` exist.
// total(m): of row m.
template <int M, class Total>
FEWBIT_INLINE void finish(const SegmentTask& task, int64_t row, int64_t first, int64_t count, const Total& total) {
  const auto scale = [&](int m) { return broadcast(task.x_scale[first + m]); };
  if constexpr (M % kDigits == 0) {
    if (task.digits == kDigits) {
#pragma GCC unroll 8
      for (int m = 0; m < M; m += kDigits) {
        if (m >= count) break;
        F all = multiply(total(m), scale(m));
        all = fused(total(m + 1), scale(m + 1), all);
        put(task, row, (first + m) / kDigits, fused(total(m + 2), scale(m + 2), all));
      }
      return;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    if (m >= count) break;
    put(task, row, first + m, task.x_blocks == 1 ? multiply(total(m), scale(m)) : total(m));
  }
}

// The same of a strip's row groups.
template <int T, int M>
FEWBIT_INLINE void finish_inline(const SegmentTask& task, const Strip& strip, const F (&total)[T][M]) {
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    if (t >= strip.groups) break;
    finish<M>(task, strip.at(task, t).row, strip.token, strip.tokens, [&](int m) { return total[t][m]; });
  }
}

template <int T, int M>
FEWBIT_APART void finish_by_call(const SegmentTask& task, const Strip& strip, const F (&total)[T][M]) {
  finish_inline(task, strip, total);
}

// Inlined in every kernel it would be most of the code; but a call takes as long as a chunk of one token.
template <int T, int M>
FEWBIT_INLINE void finish_strip(const SegmentTask& task, const Strip& strip, const F (&total)[T][M]) {
  if constexpr (M == 1) return finish_inline(task, strip, total);
  F totals[T][M];  // in memory, where those that are added to are in registers
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) totals[t][m] = total[t][m];
  finish_by_call(task, strip, totals);
}

// The same of tokens that were computed M at a time and whose totals are kept, settled but where they are `kPartly`. A call of
// its own, as above.
template <int M, int T>
FEWBIT_APART void finish_totals(const SegmentTask& task, const Strip& strip, Settling how,
                                const Line (&line)[T], const float (*totals)[T][kLanes]) {
  for (int64_t m = 0; m < strip.tokens; m += M) {
    const Tokens<M> all(task, Segment(task), m);
    for (int t = 0; t < T && t < strip.groups; t++)
      finish<M>(task, Group(task, strip.group + t).row, m, strip.tokens - m, [&](int i) {
        const F total = load(totals[m + i][t]);
        return how == kPartly ? settle(settling(task), all, i, total, line[t], broadcast(0.0f)) : total;
      });
  }
}

// Whether tiles lie apart that are multiplied where they stand: also beside more tokens where a vector is a whole tile. From one
// place such a processor reads less than memory gives.
template <int T, int M>
constexpr bool kDirectApart = kTilesApart<T, M> || (kGroupsPerTile == 1 && M > 2 && T > 1);

// T row groups x M tokens, decoded where they stand; C sums a row group and token, which g takes in turn: where they are
// as many as K multiplies fields in place, one for each of them, divided when all has been added up.
template <class K, int T, int M, int C>
void direct(const SegmentTask& task, const Strip& strip) {
  constexpr int P = K::kPlanes;
  constexpr bool kShiftLast = C > 1 && C == K::kFields;
  using Sum = typename K::Sum;
  const K kernel(task);
  F total[T][M];
  const uint8_t* codes[T];
  int64_t parameters[T];
  const auto* x = activations_of<typename K::X>(task, strip);
  for (int t = 0; t < T; t++) {
    const Group group = strip.at(task, t);
    codes[t] = group.codes, parameters[t] = group.parameters;
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) total[t][m] = broadcast(0.0f);
  const int64_t ahead = kDirectApart<T, M> ? (M > 2 ? 2 : 1) * kAheadApart : next_strip(task, T);
  const Settling how = settling(task);
  int64_t chunk = 0;
  for (Segment segment(task); segment.index < task.segments; segment.advance(task)) {
    const Tokens<M> tokens(task, segment, strip.token);
    Sum dot[C][T][M][P];
    Held<K::kBits, kInHalves<K>> held[T];
    if constexpr (K::kBegins >= 0)
      for (int m = 0; m < M; m++)
        for (int t = 0; t < T; t++)
          dot[0][t][m][K::kBegins].begin(multiply(broadcast(tokens.sum[m]), broadcast(kernel.origin)));
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    for (; chunk < end; chunk++, x += M * 32) {
      if (T > 1 && ahead)  // of one, the next follows in memory, as the processor expects
        for (int t = 0; t < T; t++) prefetch<K::kBits>(codes[t] + ahead);
      // Two row groups that take turns at a tile's lines: each fetches half of the next tile.
      if constexpr (T == 1 && M == kDigits && K::kFields == 1 && kGroupsPerTile == 2)
        for (int i = static_cast<int>(strip.group % 2); i < K::kBits; i += 2)
          __builtin_prefetch(codes[0] + task.chunks * K::kBits * 64 + i * 64, 0, 2);
#pragma GCC unroll kUnroll
      for (int g = 0; g < 8; g++) {
        U u[T][P];
        for (int t = 0; t < T; t++) {
          held[t].advance(codes[t], g);
          if constexpr (kShiftLast)
            u[t][0] = kernel.in_place(held[t].part[0], g);
          else
            kernel.split(held[t].quad(g), u[t]);
        }
        for (int m = 0; m < M; m++)
          for (int t = 0; t < T; t++)
            for (int p = 0; p < P; p++) {
              Sum& sum = dot[g % C][t][m][p];
              if constexpr (kShiftLast && T == 1)
                sum.add_once(u[t][p], x + m * 32 + g * 4 + p * K::kApart);
              else
                sum.add(u[t][p], x + m * 32 + g * 4 + p * K::kApart);
            }
        if ((g + 1) % Sum::kGroups == 0)
          for (int t = 0; t < T; t++)
            for (int m = 0; m < M; m++)
              for (int p = 0; p < P; p++) dot[g % C][t][m][p].flush();
      }
      for (int t = 0; t < T; t++) codes[t] += K::kBits * 64;
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const Line line(task, kernel.step, parameters[t] + segment.weight);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        if constexpr (C > 1)
#pragma GCC unroll 8
          for (int c = 1; c < C; c++)
#pragma GCC unroll 2
            for (int p = 0; p < P; p++) dot[0][t][m][p].merge(dot[c][t][m][p], kShiftLast ? c * K::kBits : 0);
        total[t][m] = settle(how, tokens, m, kernel.value(dot[0][t][m]), line, total[t][m]);
        // Codes that are multiplied as they are stored leave GCC room to move sums from register to register; not without these.
        if constexpr (M == 8 && K::kBits == 8) asm("" : "+m"(total[t][m]));
      }
    }
  }
  finish_strip(task, strip, total);
}

// Row groups by T, for all M tokens of a task.
template <class K, int T, int M, int C>
FEWBIT_INLINE void strips_direct(const SegmentTask& task, int64_t group, int64_t end, int64_t tokens) {
  if constexpr (kDirectApart<T, M>)
    return strips_apart<T>(task.rows, group / kGroupsPerTile, 0, tokens,
                           [&](const Strip& strip) { direct<K, T, M, C>(task, strip); });
  for (; group < end; group += T) direct<K, T, M, C>(task, {group, end - group, 0, tokens});
}

}  // namespace
}  // namespace fewbit
