// SPDX-License-Identifier: Apache-2.0
// Attention over keys and values in the layout drawn in steps.h, with a running softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867): span by span of positions, so that memory does not grow with their number. Spans begin at multiples
// of kSpan whatever the queries, which are computed independently of one another: how tokens are cut into calls changes
// no bit. Included after a simd.h.
#pragma once

#include <math.h>

#include <type_traits>

#include "decode/between.h"
#include "decode/elements.h"

namespace fewbit {
namespace {

constexpr int kVectors = kTile / kLanes;  // of a tile's positions
constexpr int kTogether = 4;              // queries that share what is loaded
// Sums that are kept in registers: enough to hide their latency. AVX2 has 16 in all, of which codes need more themselves.
template <class E>
constexpr int kSums = kLanes == 16 ? 16 : kLanes != 8 ? 1 : E::kBits < 16 ? 8 : 12;
constexpr float kNever = -INFINITY;

// Elements [0, kLanes) after element (line, first) of a tile that has `length` elements a line. Keys of 4 bits pair
// lines, values pair halves of a line.
template <class E, bool VALUES>
struct Loader {
  static FEWBIT_INLINE F at(const uint8_t* tile, int64_t length, int64_t line, int64_t first) {
    return E::load(tile + (line * length + first) * (E::kBits / 8));
  }
};

template <bool VALUES>
struct Loader<Int4, VALUES> {
  static FEWBIT_INLINE F at(const uint8_t* tile, int64_t length, int64_t line, int64_t first) {
    if (VALUES) return Int4::load(tile + (line * length + first / 32 * 32) / 2 + first % 16, first % 32 >= 16);
    return Int4::load(tile + line / 2 * length + first, line % 2 != 0);
  }
};

// What the next call will read: lines are fetched early, at as many bytes as this one reads of its own, into the
// second-level cache.
template <int BYTES>
FEWBIT_INLINE void fetch(const uint8_t* ahead) {
  for (int at = 0; at < BYTES; at += 64) __builtin_prefetch(ahead + at, 0, 2);
}

// scores[q][p] = q . key p for Q queries and the positions of T tiles: enough sums to hide their latency.
template <class E, int Q, int T>
FEWBIT_INLINE void score_tiles(const HeadLayout& layout, const uint8_t* tiles, const uint8_t* ahead,
                               const float* const* q, float* scores) {
  constexpr int line = T * kTile * E::kBits / 8;
  F total[T][Q][kVectors];
  for (int t = 0; t < T; t++)
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < kVectors; v++) total[t][i][v] = broadcast(0.0f);
  for (int64_t d = 0; d < layout.dim; d++) {
    fetch<line>(ahead + d * line);
    F query[Q];
    for (int i = 0; i < Q; i++) query[i] = broadcast(q[i][d]);
    for (int t = 0; t < T; t++)
      for (int v = 0; v < kVectors; v++) {
        const F key = Loader<E, false>::at(tiles + t * layout.key_tile, kTile, d, v * kLanes);
        for (int i = 0; i < Q; i++) total[t][i][v] = fma(query[i], key, total[t][i][v]);
      }
  }
  for (int t = 0; t < T; t++)
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < kVectors; v++) store(scores + t * kTile + i * kSpan + v * kLanes, total[t][i][v]);
}

// out[q] += sum over positions [begin, end) of weights[q][p] * value p, for Q queries and V vectors of dimensions.
template <class E, int Q, int V>
FEWBIT_INLINE void mix_lanes(const HeadLayout& layout, const uint8_t* values, const uint8_t* ahead, int64_t begin,
                             int64_t end, const float* weights, int64_t first, float* out) {
  constexpr int line = V * kLanes * E::kBits / 8;
  F total[Q][V];
  for (int i = 0; i < Q; i++)
    for (int v = 0; v < V; v++) total[i][v] = load(out + i * layout.width + first + v * kLanes);
  for (int64_t p = begin; p < end; p++) {
    fetch<line>(ahead + (p * layout.width + first) * E::kBits / 8);
    F weight[Q];
    for (int i = 0; i < Q; i++) weight[i] = broadcast(weights[i * kSpan + p]);
    for (int v = 0; v < V; v++) {
      const F value = Loader<E, true>::at(values, layout.width, p, first + v * kLanes);
      for (int i = 0; i < Q; i++) total[i][v] = fma(weight[i], value, total[i][v]);
    }
  }
  for (int i = 0; i < Q; i++)
    for (int v = 0; v < V; v++) store(out + i * layout.width + first + v * kLanes, total[i][v]);
}

template <class E, int Q>
FEWBIT_INLINE void mix_block(const HeadLayout& layout, const uint8_t* values, const uint8_t* ahead, int64_t begin,
                             int64_t end, const float* weights, float* out) {
  constexpr int V = kWidth / kLanes;
  int64_t first = 0;
  const auto some = [&](auto vectors) {
    constexpr int N = decltype(vectors)::value;
    mix_lanes<E, Q, N>(layout, values, ahead, begin, end, weights, first, out);
    first += N * kLanes;
  };
  if constexpr (kLanes == 8 && Q * V > kSums<E>) {
    while (first < layout.width) some(std::integral_constant<int, V / 2>());
  } else {
    if constexpr (2 * Q * V <= kSums<E>)
      while (first + 2 * kWidth <= layout.width) some(std::integral_constant<int, 2 * V>());
    while (first < layout.width) some(std::integral_constant<int, V>());
  }
}

template <class E, int Q>
FEWBIT_INLINE void score_block(const HeadLayout& layout, const uint8_t* head, const uint8_t* ahead, int64_t begin,
                               int64_t end, const float* const* q, float* scores) {
  int64_t t = begin;
  const auto some = [&](auto tiles) {
    constexpr int T = decltype(tiles)::value;
    const int64_t at = t * layout.key_tile;
    score_tiles<E, Q, T>(layout, head + at, ahead + at, q, scores + t * kTile);
    t += T;
  };
  if constexpr (4 * Q * kVectors <= kSums<E>)
    while (t + 4 <= end) some(std::integral_constant<int, 4>());
  if constexpr (2 * Q * kVectors <= kSums<E>)
    while (t + 2 <= end) some(std::integral_constant<int, 2>());
  while (t < end) some(std::integral_constant<int, 1>());
}

// Of one head: keys and values in a block, and the keys or the values that are read after these.
struct Seen {
  const uint8_t *head, *ahead;
};

template <class E>
void score_some(const HeadLayout& layout, const Seen& seen, int64_t tile_begin, int64_t tile_end,
                const float* const* q, int64_t queries, float* scores) {
  switch (queries) {
    case 1: return score_block<E, 1>(layout, seen.head, seen.ahead, tile_begin, tile_end, q, scores);
    case 2: return score_block<E, 2>(layout, seen.head, seen.ahead, tile_begin, tile_end, q, scores);
    case 3: return score_block<E, 3>(layout, seen.head, seen.ahead, tile_begin, tile_end, q, scores);
    default: return score_block<E, 4>(layout, seen.head, seen.ahead, tile_begin, tile_end, q, scores);
  }
}

template <class E>
void mix_some(const HeadLayout& layout, const Seen& seen, int64_t begin, int64_t end, int64_t queries,
              const float* weights, float* out) {
  const uint8_t *values = seen.head + layout.values, *ahead = seen.ahead;
  switch (queries) {
    case 1: return mix_block<E, 1>(layout, values, ahead, begin, end, weights, out);
    case 2: return mix_block<E, 2>(layout, values, ahead, begin, end, weights, out);
    case 3: return mix_block<E, 3>(layout, values, ahead, begin, end, weights, out);
    default: return mix_block<E, 4>(layout, values, ahead, begin, end, weights, out);
  }
}

// The codec of each type of elements: how up to kTogether queries see keys and values.
struct Codec {
  void (*score)(const HeadLayout&, const Seen&, int64_t tile_begin, int64_t tile_end, const float* const* q,
                int64_t queries, float* scores);
  void (*mix)(const HeadLayout&, const Seen&, int64_t begin, int64_t end, int64_t queries, const float* weights,
              float* out);
};

template <class E>
constexpr Codec codec_of() { return {score_some<E>, mix_some<E>}; }

// By FEWBIT_FLOAT32, FEWBIT_BFLOAT16, FEWBIT_FLOAT16, FEWBIT_KV_INT8, FEWBIT_KV_INT4.
constexpr Codec kCodecs[] = {codec_of<Float32>(), codec_of<BFloat16>(), codec_of<Float16>(), codec_of<Int8>(),
                             codec_of<Int4>()};

// What a query has seen so far: the largest score, the sum of e^(score - largest), and that of these times values.
struct State {
  float most, total;
};

// Positions of a span.
struct Range {
  int64_t begin, end;
};

// Those of the tiles that a range touches.
FEWBIT_INLINE Range whole_tiles(const Range& range) {
  return {range.begin / kTile * kTile, (range.end + kTile - 1) / kTile * kTile};
}

// Scores of positions `mine` become weights, those of the others among the tiles of `all` 0; `out`, (width), is scaled to
// the new largest score. Nothing changes where nothing is seen.
FEWBIT_INLINE void weigh(float* scores, const Range& mine, const Range& all, State* state, float* out, int64_t width) {
  const Range tiles = whole_tiles(all);
  for (int64_t p = tiles.begin; p < mine.begin; p++) scores[p] = kNever;
  for (int64_t p = mine.end; p < tiles.end; p++) scores[p] = kNever;
  F lane = load(scores + tiles.begin);
  for (int64_t p = tiles.begin + kLanes; p < tiles.end; p += kLanes) lane = larger(lane, load(scores + p));
  const float here = largest_of(lane), most = state->most > here ? state->most : here;
  if (most > state->most) {
    if (state->total != 0.0f) {
      const float factor = exp_of(state->most - most);
      for (int64_t d = 0; d < width; d++) out[d] *= factor;
      state->total *= factor;
    }
    state->most = most;
  }
  const float largest = state->most;
  F total[kVectors];
  for (int v = 0; v < kVectors; v++) total[v] = broadcast(0.0f);
  for (int64_t p = tiles.begin; p < tiles.end; p += kTile)
    for (int v = 0; v < kVectors; v++) {
      const F weight = exp_of(load(scores + p + v * kLanes) - largest);
      store(scores + p + v * kLanes, weight);
      total[v] = add(total[v], weight);
    }
  for (int half = kVectors / 2; half; half /= 2)
    for (int v = 0; v < half; v++) total[v] = add(total[v], total[v + half]);
  state->total += sum_lanes(total[0]);
}

// A span, and what up to kTogether queries see of it.
struct Span {
  const AttentionTask& task;
  int64_t first_block, last_block;  // of the span; of the call
  Range range[kTogether], all;  // seen by each query; from the first to the last that any sees

  FEWBIT_INLINE Span(const AttentionTask& what, int64_t block, int64_t last, const Query* queries, int64_t count)
      : task(what), first_block(block), last_block(last), all{kSpan, 0} {
    for (int64_t i = 0; i < count; i++) {
      const int64_t position = queries[i].position - block * kBlock;
      Range& mine = range[i];
      mine.end = position + 1 < kSpan ? position + 1 : kSpan;
      mine.begin = task.window && position >= task.window ? position - task.window + 1 : 0;
      if (mine.begin >= mine.end) continue;
      all.begin = mine.begin < all.begin ? mine.begin : all.begin;
      all.end = mine.end > all.end ? mine.end : all.end;
    }
  }

  FEWBIT_INLINE const uint8_t* head(int64_t block) const {
    return task.blocks[block] + (task.is_closed[block] ? task.closed_at : task.open_at);
  }

  // What is read after the keys, or the values, of block `at`: all keys of the span, then its values, then the next span or
  // the task that follows.
  FEWBIT_INLINE const uint8_t* ahead(bool values, int64_t at) const {
    if (at < (all.end - 1) / kBlock) return part(values, at + 1);
    if (!values) return part(true, all.begin / kBlock);
    if (first_block + at < last_block) return part(false, at + 1);
    return task.next ? task.next : part(true, at);
  }

  // Keys or values of block `at` of the span.
  FEWBIT_INLINE const uint8_t* part(bool values, int64_t at) const {
    const int64_t block = first_block + at;
    return head(block) + (values ? (task.is_closed[block] ? task.closed : task.open).values : int64_t{0});
  }

  // work(layout, seen, first, here) for each block, of which keys or values are read: its first position in the span, and
  // those of `some` in it.
  template <class W>
  FEWBIT_INLINE void each_block(bool values, const Range& some, const W& work) const {
    for (int64_t at = some.begin / kBlock; at * kBlock < some.end; at++) {
      const int64_t first = at * kBlock, block = first_block + at;
      const Range here = {some.begin > first ? some.begin - first : 0,
                          some.end < first + kBlock ? some.end - first : kBlock};
      work(task.is_closed[block] ? task.closed : task.open, Seen{head(block), ahead(values, at)}, first, here);
    }
  }
};

// Up to kTogether queries, scores (kTogether, kSpan), out (kTogether, width).
void see_span(const Span& span, const Query* queries, int64_t count, float* scores, State* states, float* out) {
  const AttentionTask& task = span.task;
  const float* q[kTogether];
  for (int64_t i = 0; i < count; i++) q[i] = queries[i].q;
  const auto score = [&](const HeadLayout& layout, const Seen& seen, int64_t first, const Range& here) {
    kCodecs[layout.kv].score(layout, seen, here.begin / kTile, here.end / kTile, q, count, scores + first);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(seen.head + layout.scales);
    for (int64_t i = 0; i < count; i++) {
      float* s = scores + i * kSpan + first;
      for (int64_t p = here.begin; p < here.end; p++) s[p] *= task.scale;
      if (layout.scales)
        for (int64_t p = here.begin; p < here.end; p++) s[p] *= from_float16(scales[p]);
      if (task.cap != 0.0f) cap_to(s + here.begin, 1.0f, task.cap, here.end - here.begin);
    }
  };
  const auto mix = [&](const HeadLayout& layout, const Seen& seen, int64_t first, const Range& here) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(seen.head + layout.scales) + kBlock;
    if (layout.scales)
      for (int64_t i = 0; i < count; i++)
        for (int64_t p = here.begin; p < here.end; p++) scores[i * kSpan + first + p] *= from_float16(scales[p]);
    kCodecs[layout.kv].mix(layout, seen, here.begin, here.end, count, scores + first, out);
  };
  span.each_block(false, whole_tiles(span.all), score);
  for (int64_t i = 0; i < count; i++) {
    float* s = scores + i * kSpan;
    if (span.range[i].begin < span.range[i].end)
      weigh(s, span.range[i], span.all, &states[i], out + i * task.open.width, task.open.width);
    else
      for (int64_t p = span.all.begin; p < span.all.end; p++) s[p] = 0.0f;
  }
  span.each_block(true, span.all, mix);
}

void attend(const AttentionTask& task) {
  alignas(64) float scores[kTogether * kSpan];
  alignas(64) float out[kTogether * kMostHeadDim];
  const int64_t width = task.open.width;
  for (int64_t at = 0; at < task.count; at += kTogether) {
    const Query* queries = task.queries + at;
    const int64_t count = task.count - at < kTogether ? task.count - at : kTogether;
    State states[kTogether];
    int64_t earliest = queries[0].position, latest = 0;
    for (int64_t i = 0; i < count; i++) {
      states[i] = {kNever, 0.0f};
      earliest = queries[i].position < earliest ? queries[i].position : earliest;
      latest = queries[i].position > latest ? queries[i].position : latest;
    }
    memset(out, 0, static_cast<size_t>(count * width) * sizeof(float));
    const int64_t begin = task.window && earliest >= task.window ? (earliest - task.window + 1) / kSpan : 0;
    for (int64_t s = begin; s <= latest / kSpan; s++)
      see_span(Span(task, s * (kSpan / kBlock), latest / kBlock, queries, count), queries, count, scores, states, out);
    for (int64_t i = 0; i < count; i++)
      for (int64_t d = 0; d < task.open.dim; d++) queries[i].out[d] = out[i * width + d] / states[i].total;
  }
}

}  // namespace
}  // namespace fewbit
