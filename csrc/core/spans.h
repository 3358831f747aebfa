// SPDX-License-Identifier: Apache-2.0
// Products of segments.h for many tokens where lanes are too narrow for the sums of a segment: they are summed span by span.
// For an operand whose Sum offers Narrow, the sums of all its planes:
//
//   X                      what it takes activations as
//   kSpan                  groups of four columns that a narrow sum takes
//   step(narrow, codes, x, next)    adds the products of four planes' four columns and two tokens' activations
//   less(narrow, u)        what narrow sums of the codes u begin with, for any activations
//   begin(integer)         as that of Sum
//   flush(narrow)          adds the narrow sums of all planes
//   value()                the sums as floats
#pragma once

#include <stdint.h>

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

constexpr int kPlanesBeside = 4, kTokensBeside = 2;  // that a step multiplies
constexpr int64_t kBlockChunks = 16;                 // chunks that are decoded at a time: 16 KiB

// A run of segments, or a part of a long one, of T row groups: decoded, with what all tokens share.
template <class K, int T>
struct Block {
  static constexpr int P = K::kPlanes, kSpan = Narrow<K>::kSpan;
  static constexpr int kSpans = kBlockChunks * 8 / (kSpan < 8 ? kSpan : 8);  // segments end spans

  const SegmentTask& task;
  const K kernel;
  Settling how;
  bool begins;             // whether sums of products begin with something
  int64_t first, chunks;   // of the row; of each segment but the last one
  int64_t all, segments;   // chunks and segments of the block
  int64_t index, activation[kBlockChunks];  // of the first segment; of each one's scales of activations
  alignas(64) uint8_t codes[kBlockChunks * 8][T][P][kLanes * 4];
  U start[kSpans][T][P];
  Line line[kBlockChunks][T];
  float totals[kRoundedTokens][T][kLanes];

  explicit FEWBIT_INLINE Block(const SegmentTask& t) : task(t), kernel(t), how(settling(t)) {}
};

// Decodes `chunks` chunks of a segment, the block's from `at`, whose spans are those from `span`.
template <class K, int T>
FEWBIT_INLINE void decode_spans(Block<K, T>& block, const SegmentStrip& rows, int64_t at, int64_t chunks, int64_t span) {
  constexpr int P = K::kPlanes, kSpan = Narrow<K>::kSpan;
  for (int t = 0; t < T; t++) {
    const uint8_t* codes = Group(block.task, rows.at(t)).codes + (block.first + at) * K::kBits * 64;
    Held<K::kBits> held;
    U start[P] = {};
    U* out = block.start[span][t];
    for (int64_t c = 0; c < chunks; c++, codes += K::kBits * 64) {
      prefetch<K::kBits>(codes + kBlockChunks * K::kBits * 64);
#pragma GCC unroll 8
      for (int g = 0; g < 8; g++) {
        U plane[P];
        held.advance(codes, g);
        block.kernel.split(held.quad(g), plane);
        for (int p = 0; p < P; p++) {
          store_lanes(block.codes[(at + c) * 8 + g][t][p], plane[p]);
          start[p] = Narrow<K>::less(start[p], plane[p]);
        }
        if ((g + 1) % (kSpan < 8 ? kSpan : 8)) continue;
        for (int p = 0; p < P; p++) out[p] = start[p];
        if ((c * 8 + g + 1) % kSpan) continue;
        out += T * P;
        for (int p = 0; p < P; p++) start[p] = U{};
      }
    }
  }
}

// The sums of two of M tokens, over `chunks` chunks.
template <class K, int T, int M>
FEWBIT_INLINE void multiply_spans(const uint8_t*& codes, const U*& start, int64_t chunks, const typename Narrow<K>::X*& x,
                                  Narrow<K> (&dot)[T][kTokensBeside]) {
  using Sum = Narrow<K>;
  constexpr int P = K::kPlanes, H = kTokensBeside, kGroups = Sum::kSpan < 8 ? Sum::kSpan : 8, kChunks = (Sum::kSpan + 7) / 8;
  static_assert(T * P == kPlanesBeside, "a step multiplies as many");
  for (int64_t c = 0; c < chunks;) {
    const int64_t end = c + kChunks < chunks ? c + kChunks : chunks;
#pragma GCC unroll 1
    for (int begin = 0; begin < 8; begin += kGroups, start += T * P) {
      U narrow[T * P][H];
#pragma GCC unroll 4
      for (int v = 0; v < T * P; v++)
#pragma GCC unroll 2
        for (int h = 0; h < H; h++) narrow[v][h] = start[v];
      do {
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; g++) Sum::step(narrow, codes + g * T * P * kLanes * 4, x + g * 4, x + 32 + g * 4);
        codes += kGroups * T * P * kLanes * 4;
        x += kGroups == 8 ? M * 32 : kGroups * 4;
      } while (kGroups == 8 && ++c < end);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int h = 0; h < H; h++)
          if constexpr (P == 2)
            dot[t][h].flush(narrow[t * 2][h], narrow[t * 2 + 1][h]);
          else
            dot[t][h].flush(narrow[t][h]);
    }
    if (kGroups < 8) x += (M - 1) * 32, c++;
  }
}

template <Settling how, class K, int T>
FEWBIT_INLINE void settle_spans(const Narrow<K> (&dot)[T][kTokensBeside],
                                const Tokens<1>& tokens, const Line (&line)[T], float (*totals)[T][kLanes]) {
#pragma GCC unroll 2
  for (int h = 0; h < kTokensBeside; h++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
      store(totals[h][t], settle<how>(tokens, h, dot[t][h].value(), line[t], load(totals[h][t])));
}

// Multiplies a block by two of M tokens from `token`, and adds to their totals.
template <class K, int T, int M>
FEWBIT_INLINE void add_two(Block<K, T>& block, int64_t token, int64_t m) {
  const SegmentTask& task = block.task;
  const uint8_t* codes = block.codes[0][0][0];
  const U* start = block.start[0][0];
  const auto* x = static_cast<const typename Narrow<K>::X*>(task.activations);
  x += (token * task.chunks + block.first * M + m) * 32;
  Tokens<1> tokens(task, Segment(task), token + m);
  const float* scale = tokens.scale;
  tokens.sum = task.sums + token * task.segments + block.index * M + m;
  float(*totals)[T][kLanes] = block.totals + token + m;
#pragma GCC unroll 1
  for (int64_t s = 0; s < block.segments; s++, tokens.sum += M) {
    Narrow<K> dot[T][kTokensBeside];
    if constexpr (K::kBegins >= 0)
      if (block.begins)
#pragma GCC unroll 2
        for (int h = 0; h < kTokensBeside; h++)
#pragma GCC unroll 4
          for (int t = 0; t < T; t++)
            dot[t][h].begin(multiply(broadcast(tokens.sum[h]), broadcast(block.kernel.origin)));
    const int64_t chunks = s + 1 < block.segments ? block.chunks : block.all - s * block.chunks;
    multiply_spans<K, T, M>(codes, start, chunks, x, dot);
    tokens.scale = scale + block.activation[s];
    switch (block.how) {
      case kPlain: settle_spans<kPlain, K>(dot, tokens, block.line[s], totals); break;
      case kShifted: settle_spans<kShifted, K>(dot, tokens, block.line[s], totals); break;
      case kScaled: settle_spans<kScaled, K>(dot, tokens, block.line[s], totals); break;
      case kScaledShifted: settle_spans<kScaledShifted, K>(dot, tokens, block.line[s], totals); break;
      case kPartly: settle_spans<kPartly, K>(dot, tokens, block.line[s], totals); break;
    }
  }
}

// The same for M tokens. A call of its own: what surrounds it would keep registers.
template <class K, int T, int M>
__attribute__((noinline)) void add_block(Block<K, T>& block, int64_t token) {
#pragma GCC unroll 1
  for (int64_t m = 0; m < M; m += kTokensBeside) add_two<K, T, M>(block, token, m);
}

// Decodes the block that begins with `segment`, and goes on to the segment behind it.
template <class K, int T>
FEWBIT_INLINE void decode_block(Block<K, T>& block, const SegmentStrip& rows, Segment& segment) {
  constexpr int kSpan = Narrow<K>::kSpan;
  const SegmentTask& task = block.task;
  block.index = segment.index;
  for (int64_t s = 0, at = 0, span = 0; s < block.segments; s++, at += block.chunks) {
    const int64_t chunks = at + block.chunks < block.all ? block.chunks : block.all - at;
    decode_spans(block, rows, at, chunks, span);
    for (int t = 0; t < T; t++)
      block.line[s][t] = Line(task, block.kernel.step, Group(task, rows.at(t)).parameters + segment.weight);
    span += (chunks * 8 + kSpan - 1) / kSpan;
    block.activation[s] = segment.activation;
    if (block.how != kPartly) segment.advance(task);
  }
}

// Fetches where a block's outputs of M tokens from `token` go, while the last products are computed.
template <class K, int T, int M>
FEWBIT_INLINE void prefetch_outputs(const Block<K, T>& block, const SegmentStrip& rows, int64_t token) {
  const SegmentTask& task = block.task;
  if (task.y_dtype != FEWBIT_FLOAT32) return;
  for (int64_t m = token; m < token + M && m < rows.tokens; m++) {
    const float* y = static_cast<const float*>(task.y) + m * task.y_stride + Group(task, rows.group).row;
    for (int64_t i = 0; i < T * kLanes; i += 16) __builtin_prefetch(y + i, 1);
  }
}

// T row groups x all tokens, M at a time, block by block; a segment that is a long row is settled at the end.
template <class K, int T, int M>
void spans(const SegmentTask& task, const SegmentStrip& rows) {
  const int64_t tokens = rows.tokens, padded = (tokens + M - 1) / M * M;
  const bool long_row = task.segment_chunks > kBlockChunks;
  Block<K, T> block(task);
  if (long_row) block.how = kPartly;
  for (int64_t m = 0; m < padded; m++)
    for (int t = 0; t < T; t++) store(block.totals[m][t], broadcast(0.0f));
  block.chunks = long_row ? kBlockChunks : task.segment_chunks;
  const int64_t most = kBlockChunks / block.chunks * block.chunks;
  Segment segment(task);
  for (block.first = 0; block.first < task.chunks; block.first += block.all) {
    block.begins = !long_row || block.first == 0;
    block.all = task.chunks - block.first < most ? task.chunks - block.first : most;
    block.segments = (block.all + block.chunks - 1) / block.chunks;
    decode_block(block, rows, segment);
    for (int64_t token = 0; token < padded; token += M) {
      if (block.first + block.all == task.chunks) prefetch_outputs<K, T, M>(block, rows, token);
      add_block<K, T, M>(block, token);
    }
  }
  for (int64_t m = 0; m < tokens; m += M) {
    const Tokens<M> all(task, Segment(task), m);
    for (int t = 0; t < T && t < rows.groups; t++)
      finish<M>(task, Group(task, rows.group + t).row, m, tokens - m, [&](int i) {
        const F total = load(block.totals[m + i][t]);
        return long_row ? settle(settling(task), all, i, total, block.line[0][t], broadcast(0.0f)) : total;
      });
  }
}

template <class K, int M>
void strips_spans(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  constexpr int T = kPlanesBeside / K::kPlanes;
  for (; begin < end; begin += T) spans<K, T, M>(task, {begin, end - begin, 0, tokens});
}

}  // namespace
}  // namespace fewbit
