// SPDX-License-Identifier: Apache-2.0
// Products of segments.h for one or two tokens where arithmetic is what is short, not memory: segments are multiplied first
// and settled several at a time, so that neither loop holds registers for the other. Included after an ISA's simd.h. A Sum
// (see segments.h) whose kGroups is 8 offers also
//
//   kChunks            chunks after which `flush` must be called
#pragma once

#include <type_traits>

#include "core/segments.h"

namespace fewbit {
namespace {

constexpr int64_t kUnsettled = 16;       // segments
constexpr int64_t kFetched = 96 * 1024;  // bytes of a strip, at most
constexpr int64_t kFar = 2048;           // bytes ahead within a longer one

// How far ahead of a strip of `tiles` tiles memory is fetched. As a strip is read from several places, of which the processor
// does not foresee those of the next, that is the same place of the next one.
FEWBIT_INLINE int64_t fetched_ahead(const SegmentTask& task, int64_t tiles) {
  const int64_t bytes = tiles * task.chunks * task.bits * 64;
  return bytes < kFetched ? bytes : kFar;
}

FEWBIT_INLINE void prefetch_parameter(const void* values, bool half, int64_t index) {
  __builtin_prefetch(static_cast<const uint8_t*>(values) + index * (half ? 2 : 4), 0, 2);
}

// What T row groups x M tokens add up to, segment by segment.
template <int T, int M>
struct Unsettled {
  const SegmentTask& task;
  const SegmentStrip& strip;
  Segment segment;  // that of value[0]
  int64_t count = 0, parameters[T];
  int64_t ahead;  // where the next strip finds what the next segment is settled by, from `parameters`
  F value[kUnsettled][T][M], total[T][M];

  FEWBIT_INLINE Unsettled(const SegmentTask& whole, const SegmentStrip& rows)
      : task(whole), strip(rows), segment(whole), ahead(T / kGroupsPerTile * whole.blocks * 16) {
    for (int t = 0; t < T; t++) {
      parameters[t] = Group(task, strip.at(t)).parameters;
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
  __attribute__((noinline)) void settle_all(float step) {
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
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      if (t >= strip.groups) break;
      finish<M>(task, Group(task, strip.at(t)).row, strip.token, strip.tokens, [&](int m) { return total[t][m]; });
    }
  }
};

// Whether K itself finds what is multiplied of codes of one part, by at(part, g), as kAt says.
template <class K, class = void>
constexpr bool kTakesParts = false;
template <class K>
constexpr bool kTakesParts<K, std::void_t<decltype(K::kAt)>> = true;

template <class Sum, int T, int M, int P>
FEWBIT_INLINE void flush(Sum (&dot)[T][M][P]) {
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++) dot[t][m][p].flush();
}

// Multiplies chunks [0, chunks) of T row groups, at `codes`, by M tokens.
template <class K, int T, int M>
FEWBIT_INLINE void multiply_few(const K& kernel, const uint8_t* (&codes)[T], int64_t chunks, const typename K::X* x,
                                int64_t ahead, typename K::Sum (&dot)[T][M][K::kPlanes]) {
  constexpr int P = K::kPlanes, groups = K::Sum::kGroups;
  constexpr int64_t most = K::Sum::kChunks;
  for (int64_t left = chunks; left > 0; left -= most) {
    const int64_t run = left < most ? left : most;
    for (int64_t c = 0; c < run; c++, x += M * 32) {
      for (int t = 0; t < T; t += kGroupsPerTile) prefetch<K::kBits>(codes[t] + ahead);
      Held<K::kBits> held[T];
#pragma GCC unroll kUnroll
      for (int g = 0; g < 8; g++) {
        U u[T][P];
        for (int t = 0; t < T; t++) {
          held[t].advance(codes[t], g);
          if constexpr (kTakesParts<K>)
            u[t][0] = kernel.at(held[t].part[0], g);
          else
            kernel.split(held[t].quad(g), u[t]);
        }
        for (int m = 0; m < M; m++)
          for (int t = 0; t < T; t++)
            for (int p = 0; p < P; p++) dot[t][m][p].add(u[t][p], x + m * 32 + g * 4);
        if (groups < 8 && (g + 1) % groups == 0) flush(dot);
      }
      for (int t = 0; t < T; t++) codes[t] += K::kBits * 64;
    }
    if (groups == 8) flush(dot);
  }
}

template <class K, int T, int M>
void few(const SegmentTask& task, const SegmentStrip& strip) {
  using Sum = typename K::Sum;
  const K kernel(task);
  Unsettled<T, M> all(task, strip);
  const uint8_t* codes[T];
  for (int t = 0; t < T; t++) codes[t] = Group(task, strip.at(t)).codes;
  const auto* x = strip.activations<typename K::X>(task);
  const int64_t ahead = fetched_ahead(task, T / kGroupsPerTile);
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
  }
  all.finish_all(kernel.step);
}

// Row groups by T, for all M tokens of a task.
template <class K, int T, int M>
FEWBIT_INLINE void strips_settled(const SegmentTask& task, int64_t group, int64_t end, int64_t tokens) {
  for (; group < end; group += T) few<K, T, M>(task, {group, end - group, 0, tokens});
}

}  // namespace
}  // namespace fewbit
