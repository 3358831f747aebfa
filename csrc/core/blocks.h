// SPDX-License-Identifier: Apache-2.0
// Products of spans.h for many tokens whose activations take two bytes, or rows of digits: codes are decoded once for all of them,
// a block at a time, and multiplied by two rows at a time. Others are as in beside.h.
#pragma once

#include "core/spans.h"

namespace fewbit {
namespace {

constexpr int64_t kBlockChunks = 16;                // chunks of a block: 16 KiB, once decoded
constexpr int64_t kFewChunks = 8, kFewTokens = 16;  // the same of few tokens, of whose activations a block needs less memory

// A run of segments, or a part of a long one, of T row groups, with what all tokens share.
template <int T>
struct Block {
  const SegmentTask& task;
  Settling how;
  float origin;            // what of each activation sums begin with
  int64_t first, chunks;   // of the row; of each segment but the last one
  int64_t all, segments;   // chunks and segments of the block
  int64_t index, activation[kBlockChunks];  // of the first segment; of each one's scales of activations
  Line line[kBlockChunks][T];
  alignas(64) float totals[kRoundedTokens][T][kLanes];

  explicit FEWBIT_INLINE Block(const SegmentTask& t) : task(t), how(settling(t)) {}
};

// The same with the codes of an operand, written out.
template <class K>
struct CodeBlock : Block<kSumsBeside / kBeside / K::kPlanes> {
  static constexpr int P = K::kPlanes, T = kSumsBeside / kBeside / P;
  // Lines of a tile's next block that each of the first passes through one fetches for every chunk: all at once would be
  // waited for.
  static constexpr int kTiles = T / kGroupsPerTile, kPasses = kFetching / kBeside / kTiles;
  static constexpr int kLines = K::kBits > 1 ? (K::kBits + kPasses - 1) / kPasses : 0;

  const K kernel;
  const uint8_t* codes_at;  // codes of the first row group
  alignas(64) uint8_t codes[kBlockChunks * 8][T][P][kLanes * 4];

  explicit FEWBIT_INLINE CodeBlock(const SegmentTask& t) : Block<T>(t), kernel(t) {}

  // What one pass fetches first.
  FEWBIT_INLINE const uint8_t* next(int64_t token) const {
    if (token >= kFetching) return nullptr;
    const SegmentTask& task = this->task;
    const int64_t pass = token / kBeside, tile = task.chunks * K::kBits * 64, all = this->all;
    const int64_t over = this->first + all == task.chunks ? (kTiles - 1) * tile : 0;  // the strip behind this one
    return codes_at + all * K::kBits * 64 + pass / kPasses * tile + over + pass % kPasses * kLines * 64;
  }
};

// Adds the sums of a block's segments to the totals of tokens from `token`, of whose activations' sums two lie M apart.
template <Settling how, int M, int T, int H>
FEWBIT_INLINE void settle_as(Block<T>& block, const U (*sums)[T][H], int64_t token, const float* sums_of_x) {
  Tokens<1> tokens(block.task, Segment(block.task), token);
  tokens.sum = sums_of_x;
  const float* const scale = tokens.scale;
  auto* totals = block.totals + token;
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

// A call of its own, which all operands share.
template <int M, int T, int H>
FEWBIT_APART void settle_block(Block<T>& block, const U (*sums)[T][H], int64_t token, const float* sums_of_x) {
  switch (block.how) {
    case kPlain: return settle_as<kPlain, M>(block, sums, token, sums_of_x);
    case kShifted: return settle_as<kShifted, M>(block, sums, token, sums_of_x);
    case kScaled: return settle_as<kScaled, M>(block, sums, token, sums_of_x);
    case kScaledShifted: return settle_as<kScaledShifted, M>(block, sums, token, sums_of_x);
    case kPartly: return settle_as<kPartly, M>(block, sums, token, sums_of_x);
  }
}

// Multiplies the block by two of M tokens from `token`, and adds to their totals. Sums of all segments are kept first.
template <int M, class K>
FEWBIT_INLINE void add_some(CodeBlock<K>& block, int64_t token, int64_t m) {
  using Sum = Narrow<K>;
  constexpr int T = CodeBlock<K>::T;
  const SegmentTask& task = block.task;
  const int64_t chunk = token * task.chunks + block.first * M + m;
  Place<K> at = {block.codes[0][0][0], ActivationsOf<Sum>::at(task, token) + (block.first * M + m) * 32,
                 task.starts + chunk * Sum::kStarts, block.next(token + m)};
  const float *const sums_of_x = task.sums + token * task.segments + block.index * M + m, *sum_of_x = sums_of_x;
  U sums[kBlockChunks][T][kBeside];
#pragma GCC unroll 1
  for (int64_t s = 0; s < block.segments; s++, sum_of_x += M) {
    const int64_t chunks = s + 1 < block.segments ? block.chunks : block.all - s * block.chunks;
    U sum[T][kBeside];
    sum_segment<M, CodeBlock<K>::kLines>(block.kernel, at, chunks, block.origin, sum_of_x, sum);
    memcpy(sums[s], sum, sizeof sum);
  }
  settle_block<M>(block, sums, token + m, sums_of_x);
}

// The same for M tokens. A call of its own: what surrounds it would keep registers.
template <int M, class K>
FEWBIT_APART void add_block(CodeBlock<K>& block, int64_t token) {
#pragma GCC unroll 1
  for (int64_t m = 0; m < M; m += kBeside) add_some<M>(block, token, m);
}

// Decodes the block that begins with `segment`, and goes on to the segment behind it.
template <class K>
FEWBIT_INLINE void decode_block(CodeBlock<K>& block, const Strip& rows, Segment& segment) {
  const SegmentTask& task = block.task;
  block.index = segment.index;
  block.codes_at = Group(task, rows.group).codes + block.first * K::kBits * 64;
  for (int t = 0; t < block.T; t++)
    write_codes(block.kernel, rows.at(task, t).codes + block.first * K::kBits * 64, block.all,
                block.codes[0][t][0], sizeof block.codes[0]);
  for (int64_t s = 0; s < block.segments; s++) {
    for (int t = 0; t < block.T; t++)
      block.line[s][t] = line_of(task, block.kernel, rows.at(task, t).parameters + segment.weight);
    block.activation[s] = segment.activation;
    if (block.how != kPartly) segment.advance(task);
  }
}

// Row groups x all tokens, M at a time, block by block; a segment that is a long row is settled at the end.
template <class K, int M>
void blocks(const SegmentTask& task, const Strip& rows) {
  constexpr int T = CodeBlock<K>::T;
  const int64_t tokens = rows.tokens, padded = (tokens + M - 1) / M * M;
  const bool long_row = task.segment_chunks > kBlockChunks;
  const int64_t room = !long_row && tokens <= kFewTokens && task.segment_chunks <= kFewChunks ? kFewChunks : kBlockChunks;
  CodeBlock<K> block(task);
  if (long_row) block.how = kPartly;
  for (int64_t m = 0; m < padded; m++)
    for (int t = 0; t < T; t++) store(block.totals[m][t], broadcast(0.0f));
  block.chunks = long_row ? kBlockChunks : task.segment_chunks;
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
  finish_totals<M>(task, rows, block.how, block.line[0], block.totals);
}

template <class K, int M>
FEWBIT_INLINE void strips_blocks(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  for (; begin < end; begin += CodeBlock<K>::T) blocks<K, M>(task, {begin, end - begin, 0, tokens});
}

}  // namespace
}  // namespace fewbit
