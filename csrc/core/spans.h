// SPDX-License-Identifier: Apache-2.0
// Products of segments.h for many tokens where lanes are too narrow for the sums of a segment: they are summed span by span.
// For an operand whose Sum offers Narrow, the sums of all its planes:
//
//   X                      what it takes activations as
//   kSpan                  groups of four columns that a narrow sum takes
//   kStarts                int32s of task.starts that a chunk of a row has
//   kCentre                what of a code's plane, for each activation, narrow sums leave out
//   start(at)              what narrow sums begin with that stands there; zeros where there is nothing. Without kStarts they
//                          have 32 bits and begin as the sums of a segment do
//   step(narrow, codes, x, next)    adds the products of four planes' four columns and two tokens' activations
//   step(narrow, u, v, x)  the same of two planes and four tokens, whose activations are 32 apart
//   hold(u)                keeps a vector in its register
//   widened(narrow)        the narrow sums of all planes as one of 32 bits
//   add(wide, other)       sums of those
//   integer(float)         a float that is one
//   activations(task, row)    where those of a row are that is the first of kTogether, if elsewhere than the task's
//   Rest                   what steps leave out of a row's group of four columns, number `group`; or none of these
//   rests(task, row)       their lists, from that of a row
//   add_rest(sum, h, rest, codes)    adds the products of one
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "core/segments.h"

namespace fewbit {
namespace {

template <class Sum, class = void>
constexpr bool kHasSpans = false;
template <class Sum>
constexpr bool kHasSpans<Sum, std::void_t<typename Sum::Narrow>> = true;

template <class K>
using Narrow = typename K::Sum::Narrow;

// Whether sums leave anything out.
template <class Sum, class = void>
constexpr bool kHasRests = false;
template <class Sum>
constexpr bool kHasRests<Sum, std::void_t<typename Sum::Rest>> = true;

// Where activations of a row are that is the first of kTogether.
template <class Sum, class = void>
struct ActivationsOf {
  static FEWBIT_INLINE auto at(const SegmentTask& task, int64_t row) {
    return static_cast<const typename Sum::X*>(task.activations) + row * task.chunks * 32;
  }
};
template <class Sum>
struct ActivationsOf<Sum, std::void_t<decltype(&Sum::activations)>> {
  static FEWBIT_INLINE auto at(const SegmentTask& task, int64_t row) { return Sum::activations(task, row); }
};

// Of which segment a group of four columns is where each has `chunks` chunks: times this, in units of 2^-32. There are few.
inline int64_t segment_inverse(int64_t chunks) { return (int64_t{1} << 32) / (chunks * 8) + 1; }

// What rows leave out, each in order, and how many come before each chunk.
template <class Rest>
struct RestLists {
  const Rest* rests;      // of rows, `apart`
  const int32_t* before;  // (chunks + 1, together): of rows
  int64_t apart, together;
};

// Adds to sums of segments what H rows left out of `chunks` chunks from `first`; groups of four columns of codes lie `apart`
// bytes apart. No branch depends on where rests are.
template <class Sum, int T, int H>
FEWBIT_INLINE void add_rests(const SegmentTask& task, int64_t row, int64_t first, int64_t chunks, int64_t inverse,
                             U (*sums)[T][H], const uint8_t* codes, int64_t apart) {
  if constexpr (kHasRests<Sum>) {
    const RestLists<typename Sum::Rest> lists = Sum::rests(task, row);
    const int32_t *begin = lists.before + first * lists.together, *end = begin + chunks * lists.together;
    if (memcmp(begin, end, H * sizeof *begin) == 0) return;
    const auto* list = lists.rests;
    for (int h = 0; h < H; h++, list += lists.apart)
      for (const auto* rest = list + begin[h]; rest < list + end[h]; rest++) {
        const int64_t group = rest->group - first * 8;
        Sum::add_rest(sums[group * inverse >> 32], h, *rest, codes + group * apart);
      }
  }
}

constexpr int kSumsBeside = 8;              // that registers hold
constexpr int kBeside = 2, kFewBeside = 4;  // tokens of a step: where there are many, and few
constexpr int kFetching = 8;                // tokens in whose passes what comes next is fetched

// Bits of a code where it is stored, of operands that take it as it was written out.
template <class K, class = void>
constexpr int packed_bits = K::kBits;
template <class K>
constexpr int packed_bits<K, std::void_t<decltype(K::kPacked)>> = K::kPacked;

// What of a code, for each activation, narrow sums of all planes leave out.
template <class K>
constexpr float left_out = Narrow<K>::kCentre * (K::kPlanes == 2 ? 17 : 1);

// Whether codes may be counted from the largest down, and whether sums begin with nothing then.
template <class K>
constexpr bool kMirrors = K::kBegins >= 0 && K::kPlanes == 1 && packed_bits<K> < 8 && Narrow<K>::kStarts > 0;
template <class K>
FEWBIT_INLINE bool mirrored(const K& kernel) {
  return kMirrors<K> && kernel.origin + left_out<K> == -1;
}

// What flips codes of a plane, to be counted from the largest down.
template <class K>
constexpr uint32_t kFlip = 0x01010101u * (2 * Narrow<K>::kCentre + 1);

// Whether that is to flip all bits of what is stored: of codes that are their own levels.
template <class K, class = void>
constexpr bool kOwnLevels = false;
template <class K>
constexpr bool kOwnLevels<K, std::void_t<decltype(K::kOwn)>> = true;

// Decodes `chunks` chunks of a row group: planes lie one behind the other, groups of four columns `apart` bytes apart.
template <class K>
FEWBIT_INLINE void write_codes(const K& kernel, const uint8_t* codes, int64_t chunks, uint8_t* out, int64_t apart) {
  const uint32_t stored = kOwnLevels<K> && mirrored(kernel) ? ~0u : 0, found = !kOwnLevels<K> && mirrored(kernel) ? kFlip<K> : 0;
  Held<K::kBits, kInHalves<K>> held;
  for (int64_t c = 0; c < chunks; c++, codes += K::kBits * 64)
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++, out += apart) {
      U plane[K::kPlanes];
      held.advance(codes, g);
      if constexpr (kOwnLevels<K> && kMirrors<K>) held.flip_new(stored, g);
      kernel.split(held.quad(g), plane);
      if constexpr (!kOwnLevels<K> && kMirrors<K>) plane[0] = flip(plane[0], found);
      for (int p = 0; p < K::kPlanes; p++) store_lanes(out + p * kLanes * 4, plane[p]);
    }
}

// What settles sums of K's codes.
template <class K>
FEWBIT_INLINE Line line_of(const SegmentTask& task, const K& kernel, int64_t at) {
  Line line(task, kernel.step, at);
  if (mirrored(kernel)) line.scale = multiply(line.scale, broadcast(-1.0f));
  return line;
}

// Fetches where outputs of `groups` row groups and tokens [token, end) go, while the last products are computed.
FEWBIT_INLINE void prefetch_outputs(const SegmentTask& task, const Strip& rows, int groups, int64_t token, int64_t end) {
  if (task.y_dtype != FEWBIT_FLOAT32) return;
  const float* y = static_cast<const float*>(task.y) + token * task.y_stride + Group(task, rows.group).row;
  for (; token < end && token < rows.tokens; token++, y += task.y_stride)
    for (int64_t i = 0; i < groups * kLanes; i += 16) __builtin_prefetch(y + i, 1);
}

// What the next products of a block are of.
template <class K>
struct Place {
  const uint8_t* codes;
  const typename Narrow<K>::X* x;
  const int32_t* start;
  const uint8_t* next;  // what is fetched early, or null

  template <int lines>
  FEWBIT_INLINE void fetch() {
    if (lines == 0 || !next) return;
    prefetch<lines>(next);
    next += packed_bits<K> * 64;
  }

  FEWBIT_INLINE void advance(int64_t bytes, int64_t activations, int64_t starts) {
    codes += bytes, x += activations, start += starts;
    asm("" : "+r"(codes), "+r"(x), "+r"(start));  // GCC would compute each of them from one
  }
};

// Multiplies `groups` groups of four columns that are decoded.
template <class K, int groups, int T>
FEWBIT_INLINE void multiply(const K&, const Place<K>& at, U (&narrow)[T][kBeside]) {
#pragma GCC unroll 8
  for (int g = 0; g < groups; g++)
    Narrow<K>::step(narrow, at.codes + g * T * kLanes * 4, at.x + g * 4, at.x + 32 + g * 4);
}

// The same of groups of a tile's chunk, or of two planes, where they stand.
template <class K, int groups, int T>
FEWBIT_INLINE void multiply(const K& kernel, const Place<K>& at, U (&narrow)[T][kFewBeside]) {
  constexpr int P = K::kPlanes;
  Held<K::kBits, kInHalves<K>> held[T / P];
#pragma GCC unroll 8
  for (int g = 0; g < groups; g++) {
    U u[T / P][P];
#pragma GCC unroll 2
    for (int t = 0; t < T / P; t++) {
      held[t].advance(at.codes + t * kLanes * 4, g);
      if constexpr (K::kBits == 4) Narrow<K>::hold(held[t].part[0]);  // GCC would load them for each half
      kernel.split(held[t].quad(g), u[t]);
    }
    Narrow<K>::step(narrow, u[0][0], u[1 / P][1 % P], at.x + g * 4);
  }
}

template <class K, int V, int H>
FEWBIT_INLINE U widened(const U (&narrow)[V][H], int t, int h) {
  if constexpr (K::kPlanes == 2) return Narrow<K>::widened(narrow[t * 2][h], narrow[t * 2 + 1][h]);
  else return Narrow<K>::widened(narrow[t][h]);
}

// Sums of a row group and a token each, more by others.
template <class K, int T, int H>
FEWBIT_INLINE void add_all(U (&sum)[T][H], const U (&other)[T][H]) {
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) sum[t][h] = Narrow<K>::add(sum[t][h], other[t][h]);
}

// The products of `chunks` chunks with H of M tokens: those of the last span, and whether `wide` has those of others.
template <int M, int lines, class K, int H, int T, int V>
FEWBIT_INLINE bool multiply_spans(const K& kernel, Place<K>& at, int64_t chunks, const U (&begin)[H], U (&narrow)[V][H],
                                  U (&wide)[T][H]) {
  using Sum = Narrow<K>;
  constexpr int kGroups = Sum::kSpan < 8 ? Sum::kSpan : 8, kChunks = (Sum::kSpan + 7) / 8, kStarts = Sum::kStarts;
  constexpr int64_t bytes = H == kFewBeside ? K::kBits * 8 * kGroups : kGroups * V * kLanes * 4;
  for (int64_t part = 0, flushed = 0;; flushed = 1) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        if constexpr (kStarts > 0) narrow[v][h] = Sum::start(at.start + h * kStarts + part);
        else narrow[v][h] = flushed ? Sum::start(nullptr) : begin[h];
      }
    if constexpr (kGroups == 8) {
      for (int64_t left = chunks < kChunks ? chunks : kChunks; left > 0; left--) {
        at.template fetch<lines>();
        multiply<K, 8>(kernel, at, narrow);
        at.advance(bytes, M * 32, M * kStarts);
      }
      if ((chunks -= kChunks) <= 0) return flushed;
    } else {
      multiply<K, kGroups>(kernel, at, narrow);
      at.advance(bytes, kGroups * 4, 0);
      if (++part == kStarts) {
        at.template fetch<lines>();
        part = 0, at.advance(0, (M - 1) * 32, M * kStarts);
        if (--chunks == 0) return flushed;
      }
    }
    U sum[T][H];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) sum[t][h] = widened<K>(narrow, t, h);
    if (flushed) add_all<K>(sum, wide);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        wide[t][h] = sum[t][h];
        asm("" : "+m"(wide[t][h]));  // the registers are those of narrow sums
      }
  }
}

// Sets `sum` to that of a segment of `chunks` chunks, times H of M tokens; `sums`: of their activations, `origin`: what of
// these sums begin with beside what starts hold.
template <int M, int lines, class K, int H, int T>
FEWBIT_INLINE void sum_segment(const K& kernel, Place<K>& at, int64_t chunks, float origin, const float* sums, U (&sum)[T][H]) {
  using Sum = Narrow<K>;
  U narrow[T * K::kPlanes][H], wide[T][H], begins[H];
  const auto begin = [&](int h) {
    if constexpr (K::kBegins < 0) return Sum::start(nullptr);
    else return Sum::integer(multiply(broadcast(sums[h]), broadcast(origin)));
  };
  if constexpr (Sum::kStarts == 0)
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) begins[h] = begin(h);
  const bool flushed = multiply_spans<M, lines>(kernel, at, chunks, begins, narrow, wide);
#pragma GCC unroll 4
  for (int h = 0; h < H; h++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t][h] = widened<K>(narrow, t, h);
  if constexpr (Sum::kStarts > 0 && K::kBegins >= 0)
    if (origin != 0)
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        const U here = begin(h);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sum[t][h] = Sum::add(sum[t][h], here);
      }
  if (flushed) add_all<K>(sum, wide);
}

}  // namespace
}  // namespace fewbit
