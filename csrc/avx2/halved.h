// SPDX-License-Identifier: Apache-2.0
// Products of bytes and of one or two tokens' activations that are added up two by two in 16 bits. Pairs of activations for which
// those have no room are halved; the other halves are listed, and multiplied by themselves.
#pragma once

#include "avx2/dot.h"
#include "avx2/rests.h"

#include "core/few.h"

namespace fewbit {
namespace {

// Four columns of a token that are multiplied once more.
struct Rest {
  int32_t group, segment;
  int8_t x[4];
};

// Those of a token, in order, less than kMost of `groups` groups; none of a token that was left whole.
struct RestList {
  static constexpr int64_t kWords = 3, kMost = 12;  // int32s of a chunk; one of as many groups
  int32_t count, whole;
  Rest rest[];

  static inline RestList& of(const SegmentTask& task, int64_t token) {
    return *reinterpret_cast<RestList*>(task.rests + token * task.chunks * kWords);
  }
};

// Whether one of a task's tokens, one or two, was left whole.
inline bool any_whole(const SegmentTask& task) {
  return RestList::of(task, 0).whole || RestList::of(task, task.together - 1).whole;
}

// Those of M tokens. Of an operand K, at(codes, g) is a group of four columns, as K::RestSum takes it.
template <int M>
struct RestsOfTokens {
  const SegmentTask& task;
  const Rest *next[M], *end[M];

  explicit FEWBIT_INLINE RestsOfTokens(const SegmentTask& whole) : task(whole) {
    for (int m = 0; m < M; m++) {
      const RestList& list = RestList::of(task, m);
      next[m] = list.rest, end[m] = list.rest + list.count;
    }
  }

  // Values are integers that float32 holds.
  template <class K, int T>
  FEWBIT_APART void add(const K& kernel, const Strip& strip, int64_t first, int64_t last,
                        F (&value)[kUnsettled][T][M]) {
    const uint8_t* codes[T];
    for (int t = 0; t < T; t++) codes[t] = strip.at(task, t).codes;
    for (int m = 0; m < M; m++)
      for (; next[m] < end[m] && next[m]->segment < last; next[m]++) {
        const int64_t group = next[m]->group;
        F(&here)[T][M] = value[next[m]->segment - first];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
          typename K::RestSum dot;
          dot.add(kernel.at(codes[t] + group / 8 * K::kBits * 64, static_cast<int>(group % 8)), next[m]->x);
          here[t][m] = fewbit::add(here[t][m], dot.value());
        }
      }
  }
};

// Halves the large pairs of a rounded token and lists the other halves, if `any`; unless these are too many.
inline void list_halves(const SegmentTask& task, int64_t token, bool any) {
  int8_t* const row = row_of<int8_t>(task, token);
  RestList& list = RestList::of(task, token);
  const auto chunk = [&](int64_t c) { return reinterpret_cast<uint8_t*>(row + c * task.together * 32); };
  const auto groups = [](U large) { return ~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(large, repeat(0)))) & 255; };
  int64_t count = 0;
  for (int64_t c = 0; c < task.chunks; c++) count += __builtin_popcount(groups(large_pairs(load_lanes(chunk(c)))));
  list.count = 0, list.whole = !any || count * RestList::kMost > task.chunks * 8;
  for (int64_t c = 0; c < task.chunks && !list.whole; c++) {
    const U here = load_lanes(chunk(c)), large = large_pairs(here), half = mask(half_of(here), large);
    int8_t halves[32];
    store_lanes(reinterpret_cast<uint8_t*>(halves), half);
    store_lanes(chunk(c), _mm256_sub_epi8(here, half));
    for (int left = groups(large); left; left &= left - 1) {
      Rest& rest = list.rest[list.count++];
      const int g = __builtin_ctz(left);
      rest.group = static_cast<int32_t>(c * 8 + g), rest.segment = static_cast<int32_t>(c / task.segment_chunks);
      memcpy(rest.x, halves + g * 4, sizeof rest.x);
    }
  }
}

}  // namespace
}  // namespace fewbit
