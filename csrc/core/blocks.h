// SPDX-License-Identifier: Apache-2.0
// Products of spans.h for many tokens: codes are decoded once for all of them, a block at a time, and multiplied by two tokens
// at a time.
#pragma once

#include "core/spans.h"

namespace fewbit {
namespace {

constexpr int64_t kBlockChunks = 16;                // chunks of a block: 16 KiB, once decoded
constexpr int64_t kFewChunks = 8, kFewTokens = 16;  // the same of few tokens, of whose activations a block needs less memory

// A run of segments, or a part of a long one, of T row groups, with what all tokens share.
template <class K>
struct Block {
  static constexpr int P = K::kPlanes, T = kSumsBeside / kBeside / P;
  // Lines of a tile's next block that each of the first passes through one fetches for every chunk: all at once would be
  // waited for.
  static constexpr int kTiles = T / kGroupsPerTile, kPasses = kFetching / kBeside / kTiles;
  static constexpr int kLines = K::kBits > 1 ? (K::kBits + kPasses - 1) / kPasses : 0;

  const SegmentTask& task;
  const K kernel;
  Settling how;
  float origin;            // what of each activation sums begin with
  int64_t first, chunks;   // of the row; of each segment but the last one
  int64_t all, segments;   // chunks and segments of the block
  int64_t inverse;         // see segment_inverse
  int64_t index, activation[kBlockChunks];  // of the first segment; of each one's scales of activations
  const uint8_t* codes_at;  // codes of the first row group
  alignas(64) uint8_t codes[kBlockChunks * 8][T][P][kLanes * 4];
  Line line[kBlockChunks][T];
  float totals[kRoundedTokens][T][kLanes];

  explicit FEWBIT_INLINE Block(const SegmentTask& t)
      : task(t), kernel(t), how(settling(t)) {}

  // What one pass fetches first.
  FEWBIT_INLINE const uint8_t* next(int64_t token) const {
    if (token >= kFetching) return nullptr;
    const int64_t pass = token / kBeside, tile = task.chunks * K::kBits * 64;
    const int64_t over = first + all == task.chunks ? (kTiles - 1) * tile : 0;  // the strip behind this one
    return codes_at + all * K::kBits * 64 + pass / kPasses * tile + over + pass % kPasses * kLines * 64;
  }
};

template <Settling how, int T, int H>
FEWBIT_INLINE void settle_block(const U (&sum)[T][H], const Tokens<1>& tokens, const Line* line, float (*totals)[T][kLanes]) {
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    const Line here = line[t];
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
      store(totals[h][t], settle<how>(tokens, h, convert(sum[t][h]), here, load(totals[h][t])));
  }
}

// The same of all segments of a block, whose sums were kept.
template <Settling how, int M, class K, int T, int H>
FEWBIT_INLINE void settle_kept(const Block<K>& block, const U (*sums)[T][H], Tokens<1> tokens, float (*totals)[T][kLanes]) {
  const float* const scale = tokens.scale;
  F total[T][H];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) total[t][h] = load(totals[h][t]);
#pragma GCC unroll 1
  for (int64_t s = 0; s < block.segments; s++, tokens.sum += M) {
    tokens.scale = scale + block.activation[s];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const Line here = block.line[s][t];
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) total[t][h] = settle<how>(tokens, h, convert(sums[s][t][h]), here, total[t][h]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) store(totals[h][t], total[t][h]);
}

// Multiplies the block by two of M tokens from `token`, and adds to their totals. Where sums leave anything out, all of them
// are kept until that was added.
template <int M, class K>
FEWBIT_INLINE void add_some(Block<K>& block, int64_t token, int64_t m) {
  using Sum = Narrow<K>;
  constexpr int T = Block<K>::T;
  const SegmentTask& task = block.task;
  const int64_t chunk = token * task.chunks + block.first * M + m;
  Place<K> at = {block.codes[0][0][0], ActivationsOf<Sum>::at(task, token) + (block.first * M + m) * 32,
                 task.starts + chunk * Sum::kStarts, block.next(token + m)};
  Tokens<1> tokens(task, Segment(task), token + m);
  const float* scale = tokens.scale;
  const float* sum_of_x = tokens.sum = task.sums + token * task.segments + block.index * M + m;
  auto* totals = block.totals + token + m;
  U kept[kHasRests<Sum> ? kBlockChunks : 1][T][kBeside];
#pragma GCC unroll 1
  for (int64_t s = 0; s < block.segments; s++, sum_of_x += M) {
    U sum[T][kBeside];
    const int64_t chunks = s + 1 < block.segments ? block.chunks : block.all - s * block.chunks;
    sum_segment<M, Block<K>::kLines>(block.kernel, at, chunks, block.origin, sum_of_x, sum);
    if constexpr (kHasRests<Sum>) {
      memcpy(kept[s], sum, sizeof sum);
      continue;
    }
    tokens.sum = sum_of_x, tokens.scale = scale + block.activation[s];
    switch (block.how) {
      case kPlain: settle_block<kPlain>(sum, tokens, block.line[s], totals); break;
      case kShifted: settle_block<kShifted>(sum, tokens, block.line[s], totals); break;
      case kScaled: settle_block<kScaled>(sum, tokens, block.line[s], totals); break;
      case kScaledShifted: settle_block<kScaledShifted>(sum, tokens, block.line[s], totals); break;
      case kPartly: settle_block<kPartly>(sum, tokens, block.line[s], totals); break;
    }
  }
  if constexpr (kHasRests<Sum>) {
    add_rests<Sum>(task, token + m, block.first, block.all, block.inverse, kept, block.codes[0][0][0], T * kLanes * 4);
    switch (block.how) {
      case kPlain: return settle_kept<kPlain, M>(block, kept, tokens, totals);
      case kShifted: return settle_kept<kShifted, M>(block, kept, tokens, totals);
      case kScaled: return settle_kept<kScaled, M>(block, kept, tokens, totals);
      case kScaledShifted: return settle_kept<kScaledShifted, M>(block, kept, tokens, totals);
      case kPartly: return settle_kept<kPartly, M>(block, kept, tokens, totals);
    }
  }
}

// The same for M tokens. A call of its own: what surrounds it would keep registers.
template <int M, class K>
__attribute__((noinline)) void add_block(Block<K>& block, int64_t token) {
#pragma GCC unroll 1
  for (int64_t m = 0; m < M; m += kBeside) add_some<M>(block, token, m);
}

// Decodes the block that begins with `segment`, and goes on to the segment behind it.
template <class K>
FEWBIT_INLINE void decode_block(Block<K>& block, const SegmentStrip& rows, Segment& segment) {
  const SegmentTask& task = block.task;
  block.index = segment.index;
  block.codes_at = Group(task, rows.group).codes + block.first * K::kBits * 64;
  for (int t = 0; t < block.T; t++)
    write_codes(block.kernel, Group(task, rows.at(t)).codes + block.first * K::kBits * 64, block.all,
                block.codes[0][t][0], sizeof block.codes[0]);
  for (int64_t s = 0; s < block.segments; s++) {
    for (int t = 0; t < block.T; t++)
      block.line[s][t] = line_of(task, block.kernel, Group(task, rows.at(t)).parameters + segment.weight);
    block.activation[s] = segment.activation;
    if (block.how != kPartly) segment.advance(task);
  }
}

// Row groups x all tokens, M at a time, block by block; a segment that is a long row is settled at the end.
template <class K, int M>
void blocks(const SegmentTask& task, const SegmentStrip& rows) {
  constexpr int T = Block<K>::T;
  const int64_t tokens = rows.tokens, padded = (tokens + M - 1) / M * M;
  const bool long_row = task.segment_chunks > kBlockChunks;
  const int64_t room = !long_row && tokens <= kFewTokens && task.segment_chunks <= kFewChunks ? kFewChunks : kBlockChunks;
  Block<K> block(task);
  if (long_row) block.how = kPartly;
  for (int64_t m = 0; m < padded; m++)
    for (int t = 0; t < T; t++) store(block.totals[m][t], broadcast(0.0f));
  block.chunks = long_row ? kBlockChunks : task.segment_chunks;
  block.inverse = segment_inverse(block.chunks);
  const int64_t most = room / block.chunks * block.chunks;
  Segment segment(task);
  for (block.first = 0; block.first < task.chunks; block.first += block.all) {
    block.origin = !mirrored(block.kernel) && (!long_row || block.first == 0) ? block.kernel.origin + left_out<K> : 0;
    block.all = task.chunks - block.first < most ? task.chunks - block.first : most;
    block.segments = (block.all + block.chunks - 1) / block.chunks;
    decode_block(block, rows, segment);
    for (int64_t token = 0; token < padded; token += M) {
      if (block.first + block.all == task.chunks) prefetch_outputs(task, rows, T, token, token + M);
      add_block<M>(block, token);
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
FEWBIT_INLINE void strips_blocks(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  for (; begin < end; begin += Block<K>::T) blocks<K, M>(task, {begin, end - begin, 0, tokens});
}

}  // namespace
}  // namespace fewbit
