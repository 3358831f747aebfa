// SPDX-License-Identifier: Apache-2.0
// Products of segments.h for one or two tokens where registers are short: segments are multiplied first and settled several
// at a time, so that neither loop holds registers for the other. Included after an ISA's simd.h. A Sum
// (see segments.h) whose kGroups is 8 offers also
//
//   kChunks            chunks after which `flush` must be called
#pragma once

#include <type_traits>

#include "core/segments.h"

namespace fewbit {
namespace {

constexpr int64_t kUnsettled = 16;       // segments
constexpr int64_t kFetched = 96 * 1024;  // bytes of a tile that is fetched while the one before it is multiplied, at most

// How far ahead memory is fetched of tiles that are multiplied beside one another. Of one alone, that is the same place of the
// next, since one place is not enough to keep memory busy.
FEWBIT_INLINE int64_t fetched_ahead(const SegmentTask& task, int tiles) {
  const int64_t bytes = task.chunks * task.bits * 64;
  return tiles > 1 || bytes > kFetched ? kAheadApart : bytes;
}

FEWBIT_INLINE void prefetch_parameter(const void* values, bool half, int64_t index) {
  __builtin_prefetch(static_cast<const uint8_t*>(values) + index * (half ? 2 : 4), 0, 2);
}

// What T row groups x M tokens add up to, segment by segment.
template <int T, int M>
struct Unsettled {
  const SegmentTask& task;
  const Strip& strip;
  Segment segment;  // that of value[0]
  int64_t count = 0, parameters[T];
  int64_t ahead;  // where the next tiles find what the next segment is settled by, from `parameters`
  F value[kUnsettled][T][M], total[T][M];

  FEWBIT_INLINE Unsettled(const SegmentTask& whole, const Strip& rows)
      : task(whole), strip(rows), segment(whole), ahead(whole.blocks * 16) {
    for (int t = 0; t < T; t++) {
      parameters[t] = strip.at(task, t).parameters;
      for (int m = 0; m < M; m++) total[t][m] = broadcast(0.0f);
    }
  }

  template <Settling how>
  FEWBIT_INLINE void settle_as(float step) {
    F sum[T][M];
    for (int t = 0; t < T; t++)
      for (int m = 0; m < M; m++) sum[t][m] = total[t][m];
    for (int64_t i = 0; i < count; i++, segment.advance(task)) {
      const Tokens<M> tokens(task, segment, strip.token);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const Line line(task, step, parameters[t] + segment.weight);
        for (int m = 0; m < M; m++) sum[t][m] = settle<how>(tokens, m, value[i][t][m], line, sum[t][m]);
      }
    }
    for (int t = 0; t < T; t++)
      for (int m = 0; m < M; m++) total[t][m] = sum[t][m];
    count = 0;
  }

  // A call of its own, for the registers of the products.
  FEWBIT_APART void settle_all(float step) {
    switch (settling(task)) {
      case kPlain: return settle_as<kPlain>(step);
      case kShifted: return settle_as<kShifted>(step);
      case kScaled: return settle_as<kScaled>(step);
      default: return settle_as<kScaledShifted>(step);
    }
  }

  // Where the next segment's values go.
  FEWBIT_INLINE F (&next(float step))[T][M] {
    if (count == kUnsettled) settle_all(step);
    for (int t = 0; t < T && task.block_segments == 1; t += kGroupsPerTile) {
      prefetch_parameter(task.scale, task.scale_half, parameters[t] + ahead);
      if (task.offset) prefetch_parameter(task.offset, task.offset_half, parameters[t] + ahead);
    }
    ahead += 16;
    return value[count++];
  }

  FEWBIT_INLINE void finish_all(float step) {
    settle_all(step);
    finish_strip(task, strip, total);
  }
};

// How planes of a row group's codes are met, by groups of four columns: one after the other. An operand that has a Reader of its
// own may meet them in another order.
template <class K>
struct InTurn {
  Held<K::kBits, kInHalves<K>> held;

  static constexpr int group(int n) { return n; }  // that is met as the n-th
  FEWBIT_INLINE void advance(const uint8_t* codes, int n) { held.advance(codes, n); }
  FEWBIT_INLINE void read(const K& kernel, int n, U (&plane)[K::kPlanes]) { kernel.split(held.quad(n), plane); }
};
template <class K, class = void>
struct ReaderOf {
  using type = InTurn<K>;
};
template <class K>
struct ReaderOf<K, std::void_t<typename K::Reader>> {
  using type = typename K::Reader;
};

template <class Sum, int M, int P>
FEWBIT_INLINE void flush(Sum (&dot)[M][P]) {
  for (int m = 0; m < M; m++)
    for (int p = 0; p < P; p++) dot[m][p].flush();
}

// Where row groups of a tile find their codes.
template <int T, bool several = (T > kGroupsPerTile)>
struct FewCodes {
  const uint8_t* at[T];

  FEWBIT_INLINE FewCodes(const SegmentTask& task, const Strip& strip) {
    for (int t = 0; t < T; t++) at[t] = strip.at(task, t).codes;
  }
  FEWBIT_INLINE const uint8_t* group(int t) const { return at[t]; }
  FEWBIT_INLINE void advance(int64_t bytes) {
    for (int t = 0; t < T; t++) at[t] += bytes;
  }
};

// The same of more tiles: GCC would make vectors of so many addresses.
template <int T>
struct FewCodes<T, true> {
  const uint8_t* at;
  int64_t apart;  // of the tiles

  FEWBIT_INLINE FewCodes(const SegmentTask& task, const Strip& strip)
      : at(Group(task, strip.group).codes), apart(strip.codes_apart(task)) {}
  FEWBIT_INLINE const uint8_t* group(int t) const {
    return at + t / kGroupsPerTile * apart + t % kGroupsPerTile * kLanes * 4;
  }
  FEWBIT_INLINE void advance(int64_t bytes) { at += bytes; }
};

// Multiplies chunks [0, chunks) of T row groups by M tokens, and goes on behind them.
template <class K, int T, int M>
FEWBIT_INLINE void multiply_few(const K& kernel, FewCodes<T>& codes, int64_t chunks, const typename K::X* x, int64_t ahead,
                                typename K::Sum (&dot)[T][M][K::kPlanes]) {
  static_assert(T % kGroupsPerTile == 0, "whole tiles");
  constexpr int P = K::kPlanes, groups = K::Sum::kGroups;
  constexpr int beside = part_count(K::kBits) == 1 || kInHalves<K> ? T : kGroupsPerTile;  // for the registers of several parts
  constexpr bool foreseen = K::kBits == 8 && T > kGroupsPerTile;  // by processors: fetching beside them costs more than it brings
  constexpr int64_t most = K::Sum::kChunks;
  for (int64_t left = chunks; left > 0; left -= most) {
    const int64_t run = left < most ? left : most;
    for (int64_t c = 0; c < run; c++, x += M * 32) {
      for (int t = 0; t < T && !foreseen; t += kGroupsPerTile) prefetch<K::kBits>(codes.group(t) + ahead);
#pragma GCC unroll 4
      for (int first = 0; first < T; first += beside) {
        typename ReaderOf<K>::type reader[beside];
#pragma GCC unroll kUnroll
        for (int n = 0; n < 8; n++) {
          U u[beside][P];
          for (int t = 0; t < beside; t++) {
            reader[t].advance(codes.group(first + t), n);
            reader[t].read(kernel, n, u[t]);
          }
          for (int m = 0; m < M; m++)
            for (int t = 0; t < beside; t++)
              for (int p = 0; p < P; p++) dot[first + t][m][p].add(u[t][p], x + m * 32 + reader[t].group(n) * 4);
          if (groups < 8 && (n + 1) % groups == 0)
            for (int t = 0; t < beside; t++) flush(dot[first + t]);
        }
      }
      codes.advance(K::kBits * 64);
    }
    for (int t = 0; groups == 8 && t < T; t++) flush(dot[t]);
  }
}

// What an operand leaves out of the activations, as sums have no room for it: K::Rests<M>, if it does, whose
// add(kernel, strip, first, end, values) adds its products to the values of segments [first, end), one batch after another.
template <class K, int M, class = void>
struct RestsBeside {
  static constexpr bool kNone = true;
  explicit FEWBIT_INLINE RestsBeside(const SegmentTask&) {}
};
template <class K, int M>
struct RestsBeside<K, M, std::void_t<typename K::template Rests<M>>> : K::template Rests<M> {
  static constexpr bool kNone = false;
  using K::template Rests<M>::Rests;
};

template <class K, int T, int M>
void few(const SegmentTask& task, const Strip& strip) {
  using Sum = typename K::Sum;
  const K kernel(task);
  Unsettled<T, M> all(task, strip);
  FewCodes<T> codes(task, strip);
  const auto* x = activations_of<typename K::X>(task, strip);
  const int64_t ahead = fetched_ahead(task, T / kGroupsPerTile);
  RestsBeside<K, M> rests(task);
  for (int64_t segment = 0, chunk = 0; segment < task.segments; segment++, chunk += task.segment_chunks) {
    const int64_t left = task.chunks - chunk, chunks = left < task.segment_chunks ? left : task.segment_chunks;
    Sum dot[T][M][K::kPlanes];
    multiply_few<K, T, M>(kernel, codes, chunks, x + chunk * M * 32, ahead, dot);
    F(&value)[T][M] = all.next(kernel.step);
    for (int t = 0; t < T; t++)
      for (int m = 0; m < M; m++) {
        if constexpr (K::kBegins >= 0)
          dot[t][m][K::kBegins].begin(
              multiply(broadcast(task.sums[(strip.token / M * task.segments + segment) * M + m]), broadcast(kernel.origin)));
        value[t][m] = kernel.value(dot[t][m]);
      }
    if constexpr (rests.kNone) continue;
    else if (all.count == kUnsettled || segment + 1 == task.segments)
      rests.add(kernel, strip, segment + 1 - all.count, segment + 1, all.value);
  }
  all.finish_all(kernel.step);
}

// A unit's row groups by T, for all M tokens of a task; by tiles where a strip lacks some.
template <class K, int T, int M>
FEWBIT_INLINE void strips_settled(const SegmentTask& task, int64_t tile, int64_t tokens) {
  strips_apart<T>(task.rows, tile, 0, tokens, [&](const Strip& strip) {
    if (strip.groups == T) return few<K, T, M>(task, strip);
    for (int64_t t = 0; t < strip.groups; t += kGroupsPerTile)
      few<K, kGroupsPerTile, M>(task, {strip.group + t / kGroupsPerTile * strip.apart, kGroupsPerTile, 0, tokens});
  });
}

}  // namespace
}  // namespace fewbit
