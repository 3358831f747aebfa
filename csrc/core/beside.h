// SPDX-License-Identifier: Apache-2.0
// Products of spans.h for activations of a byte, four tokens at a time: the sums of a tile, or of a row group of two planes, and
// of four tokens are what registers hold. Codes that take few instructions are decoded for every four tokens, in registers, where
// there are few; others are written out once for all of them, a run of chunks at a time. What a segment and a tile take besides is
// kept short: with rows of a few hundred columns it is as much as anything.
#pragma once

#include <type_traits>

#include "core/blocks.h"

namespace fewbit {
namespace {

constexpr int64_t kMostDecoded = 16;                      // tokens for every four of which codes are decoded
constexpr int64_t kRunChunks = 64, kUnpackedChunks = 32;  // of a run, as stored, and written out: 16 KiB
constexpr int64_t kRunSegments = 24;                      // at most
constexpr int64_t kWholeSpans = 8;                        // chunks, of which parts of a long segment are multiples

// Codes that are decoded by so few instructions that they may be for every four tokens; whole chunks of them. Rests need bytes.
template <class K>
constexpr bool kDecodesFast = K::kBits == 8 || (Narrow<K>::kSpan >= 8 && part_count(K::kBits) == 1 && !kHasRests<Narrow<K>>);

// Codes of K, of which sums begin with nothing but what starts hold.
template <class K>
struct Begun : K {
  static constexpr int kBegins = -1;
  using K::K;
};

// The same, counted from the largest down.
template <class K>
struct Mirrored : Begun<K> {
  using Begun<K>::Begun;
  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const {
    K::split(codes, plane);
    plane[0] = flip(plane[0], kFlip<K>);
  }
};

// Codes of K that were written out.
template <class K>
struct Unpacked : K {
  static constexpr int kBits = 8, kPacked = K::kBits;
  using K::K;
  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = codes; }
};

// What row groups' levels are multiplied by and what is added to them, of what need not be read again for every segment.
struct Lines {
  const void *scale, *offset;
  bool scale_half, offset_half;
  float step, zero;

  FEWBIT_INLINE Lines(const SegmentTask& task, float step, float sign)
      : scale(task.scale), offset(task.offset), scale_half(task.scale_half), offset_half(task.offset_half), step(step * sign),
        zero(-task.zero * sign) {}

  template <Settling how>
  FEWBIT_INLINE Line at(int64_t index) const {
    Line line;
    if constexpr (how == kPartly) return line;
    line.scale = multiply(parameter(scale, scale_half, index), broadcast(step));
    if constexpr (how == kShifted || how == kScaledShifted)
      line.shift = offset ? fused(line.scale, broadcast(zero), parameter(offset, offset_half, index))
                          : multiply(line.scale, broadcast(zero));
    return line;
  }
};

// A run of chunks of a tile, which are whole segments or a part of a long one, beside all tokens.
struct Run {
  const SegmentTask& task;
  Settling how;
  Lines lines;
  float origin;                 // what of each activation sums begin with, beside what starts hold
  int64_t first, all, chunks;   // chunks: of the row, of the run, of each segment but the last one
  int64_t segments, inverse;    // of the run; see segment_inverse
  int64_t parameters;           // of the tile
  Segment segment;              // the first
  const uint8_t *codes, *next;  // of the tile; what follows them, as stored
  int64_t tokens;
  float* y;                     // where totals of the first row go at the end of the tile, if they need no more than scales
  alignas(64) float totals[kRoundedTokens][kGroupsPerTile][kLanes];

  FEWBIT_INLINE Run(const SegmentTask& whole, Settling as, const Lines& of, int64_t of_segment, int64_t of_tokens)
      : task(whole), how(as), lines(of), origin(0), first(0), all(0), chunks(of_segment), segments(0),
        inverse(segment_inverse(of_segment)), parameters(0), segment(whole), codes(nullptr), next(nullptr), tokens(of_tokens),
        y(nullptr) {}
};

// Adds the sums of a run's segments to what T row groups and four tokens had before, in registers.
template <Settling how, int T, int M>
FEWBIT_INLINE void settle_as(Run& run, const U (*sums)[T][M], int64_t group, int64_t token) {
  const SegmentTask& task = run.task;
  Segment segment = run.segment;
  Tokens<1> tokens(task, segment, token);
  tokens.sum = task.sums + token * task.segments + segment.index * M;
  const float* scale = task.x_scale + token * task.x_blocks;
  const int64_t parameters = run.parameters + group * kLanes;
  auto* totals = run.totals[token] + group;
  F total[T][M];
#pragma GCC unroll 2
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int h = 0; h < M; h++) total[t][h] = run.first == 0 ? broadcast(0.0f) : load(totals[h * kGroupsPerTile + t]);
#pragma GCC unroll 1
  for (const U(*end)[T][M] = sums + run.segments; sums < end; sums++, tokens.sum += M, segment.advance(task)) {
    tokens.scale = scale + segment.activation;
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
      const Line line = run.lines.at<how>(parameters + segment.weight + t * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < M; h++) total[t][h] = settle<how>(tokens, h, convert((*sums)[t][h]), line, total[t][h]);
    }
  }
  if (!run.y) {
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
      for (int h = 0; h < M; h++) store(totals[h * kGroupsPerTile + t], total[t][h]);
    return;
  }
  float* y = run.y + token * task.y_stride + group * kLanes;
  scale = task.x_scale + token;
#pragma GCC unroll 4
  for (int h = 0; h < M; h++, y += task.y_stride) {
    if (token + h >= run.tokens) break;
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) store(y + t * kLanes, multiply(total[t][h], broadcast(scale[h])));
  }
}

// A call of its own, which all operands share.
template <int T, int M>
FEWBIT_APART void settle_run(Run& run, const U (*sums)[T][M], int64_t group, int64_t token) {
  switch (run.how) {
    case kPlain: return settle_as<kPlain>(run, sums, group, token);
    case kShifted: return settle_as<kShifted>(run, sums, group, token);
    case kScaled: return settle_as<kScaled>(run, sums, group, token);
    case kScaledShifted: return settle_as<kScaledShifted>(run, sums, group, token);
    case kPartly: return settle_as<kPartly>(run, sums, group, token);
  }
}

// Multiplies row groups from `group` by four tokens from `token`, and adds to their totals. Sums of all segments are kept
// first: the registers are those of products.
template <class K, int T>
FEWBIT_INLINE void add_groups(Run& run, const K& kernel, int64_t group, int64_t token) {
  using Sum = Narrow<K>;
  constexpr int M = kFewBeside, kPasses = kFetching / M * (kGroupsPerTile / T);
  constexpr int kLines = packed_bits<K> > 1 ? (packed_bits<K> + kPasses - 1) / kPasses : 0;
  const SegmentTask& task = run.task;
  const int64_t chunk = token * task.chunks + run.first * M, pass = token / M * (kGroupsPerTile / T) + group / T;
  Place<K> at = {run.codes + group * kLanes * 4, ActivationsOf<Sum>::at(task, token) + run.first * M * 32,
                 task.starts + chunk * Sum::kStarts, token < kFetching ? run.next + pass * kLines * 64 : nullptr};
  const float *sum_of_x = task.sums + token * task.segments + run.segment.index * M, origin = run.origin;
  const int64_t chunks = run.chunks;
  U sums[kRunSegments][T][M];
  U(*sum)[T][M] = sums;
#pragma GCC unroll 1
  for (int64_t left = run.all; left > 0; left -= chunks, sum_of_x += M, sum++) {
    U here[T][M];
    sum_segment<M, kLines>(kernel, at, left < chunks ? left : chunks, origin, sum_of_x, here);
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
      for (int h = 0; h < M; h++) (*sum)[t][h] = here[t][h];
  }
  add_rests<Sum>(task, token, run.first, run.all, run.inverse, sums, run.codes + group * kLanes * 4,
                 kGroupsPerTile * kLanes * 4);
  settle_run(run, sums, group, token);
}

// The same for all tokens. A call of its own: what surrounds it would keep registers.
template <class K>
FEWBIT_APART void add_run(Run& run, const K& kernel, int64_t tokens) {
  constexpr int T = kSumsBeside / kFewBeside / K::kPlanes;
#pragma GCC unroll 1
  for (int64_t token = 0; token < tokens; token += kFewBeside)
#pragma GCC unroll 1
    for (int64_t group = 0; group < kGroupsPerTile; group += T) add_groups<K, T>(run, kernel, group, token);
}

// Writes what a tile's segments add up to.
inline void finish_run(const Run& run, const Strip& rows) {
  Line line[kGroupsPerTile];
  for (int t = 0; t < kGroupsPerTile; t++) line[t] = run.lines.at<kScaledShifted>(run.parameters + t * kLanes);
  finish_totals<kFewBeside>(run.task, rows, run.how, line, run.totals);
}

// Tiles [begin, end) x all tokens. Q: what is multiplied of codes of K.
template <class Q, class K>
void tiles_beside(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  constexpr bool kWritten = packed_bits<Q> != Q::kBits;
  constexpr int64_t room = kWritten ? kUnpackedChunks : kRunChunks;
  alignas(64) uint8_t written[kWritten ? kUnpackedChunks * 8 : 1][kGroupsPerTile][kLanes * 4];
  const K kernel(task);
  const Q operand(task);
  const bool long_row = task.segment_chunks > room;
  Run run(task, long_row ? kPartly : settling(task), Lines(task, kernel.step, mirrored(kernel) ? -1.0f : 1.0f),
          long_row ? room / kWholeSpans * kWholeSpans : task.segment_chunks, tokens);
  const bool plain = !long_row && task.x_blocks == 1 && task.y_dtype == FEWBIT_FLOAT32 && !task.bias;
  const int64_t fit = room / run.chunks, most = (fit < kRunSegments ? fit : kRunSegments) * run.chunks;
  const int64_t bytes = task.chunks * K::kBits * 64;
  for (const uint8_t* codes = task.codes + begin * bytes; begin < end; begin++, codes += bytes) {
    const Strip rows = {begin * kGroupsPerTile, kGroupsPerTile, 0, tokens};
    run.parameters = begin * task.blocks * 16;
    run.segment = Segment(task);
    for (run.first = 0; run.first < task.chunks; run.first += run.all) {
      run.origin = !mirrored(kernel) && (!long_row || run.first == 0) ? kernel.origin + left_out<K> : 0;
      run.all = task.chunks - run.first < most ? task.chunks - run.first : most;
      run.segments = (run.all + run.chunks - 1) / run.chunks;
      run.codes = codes + run.first * K::kBits * 64, run.next = run.codes + run.all * K::kBits * 64;
      if constexpr (kWritten) {
        for (int t = 0; t < kGroupsPerTile; t++)
          write_codes(kernel, run.codes + t * kLanes * 4, run.all, written[0][t], sizeof written[0]);
        run.codes = written[0][0];
      }
      const bool last = run.first + run.all == task.chunks;
      if (last) prefetch_outputs(task, rows, kGroupsPerTile, 0, tokens);
      run.y = last && plain && begin * 16 + 16 <= task.rows ? static_cast<float*>(task.y) + begin * 16 : nullptr;
      add_run(run, operand, tokens);
      for (int64_t left = run.all; !last && !long_row && left > 0; left -= run.chunks) run.segment.advance(task);
    }
    if (!run.y) finish_run(run, rows);
  }
}

// The same, of any codes; `decoded`: in registers.
template <bool decoded, class K>
void strips_beside(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  using Q = std::conditional_t<decoded, K, Unpacked<K>>;
  if constexpr (K::kBegins >= 0 && Narrow<K>::kStarts > 0) {
    const K kernel(task);
    if constexpr (kMirrors<K>)
      if (mirrored(kernel))
        return tiles_beside<std::conditional_t<decoded, Mirrored<K>, Begun<Q>>, K>(task, begin, end, tokens);
    if (kernel.origin + left_out<K> == 0) return tiles_beside<Begun<Q>, K>(task, begin, end, tokens);
  }
  tiles_beside<Q, K>(task, begin, end, tokens);
}

// The same of row groups and any activations.
template <class K>
void strips_spans(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  if constexpr (!std::is_same_v<typename Narrow<K>::X, int8_t>) {
    strips_blocks<K, kFewBeside>(task, begin, end, tokens);
  } else {
    begin /= kGroupsPerTile, end /= kGroupsPerTile;
    if constexpr (kDecodesFast<K>)
      if (K::kBits == 8 || tokens <= kMostDecoded) return strips_beside<true, K>(task, begin, end, tokens);
    if constexpr (K::kBits < 8) strips_beside<false, K>(task, begin, end, tokens);
  }
}

}  // namespace
}  // namespace fewbit
