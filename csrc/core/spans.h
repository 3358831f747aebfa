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
//   mirrored(codes, largest)   largest - code; with kStarts
//   step(narrow, codes, x, next)    adds the products of four planes' four columns and two tokens' activations
//   step(narrow, u, v, x)  the same of two planes and four tokens, whose activations are 32 apart
//   widened(narrow)        the narrow sums of all planes as one of 32 bits
//   add(wide, other)       sums of those
//   integer(float)         a float that is one
//   Rests(task, row)       what steps leave out of activations of the tokens from `row`, in groups of four columns: visit<H, B>
//                          calls each(h, x, codes) for what of H tokens B beside one another have, from h
//   rests_beside(H)        B
//   add_rest(sum, h, x, codes)    adds the products of one, whose tokens are 32 apart; or none of these
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

// Those of sums that leave nothing out.
struct NoRests {
  FEWBIT_INLINE NoRests(const SegmentTask&, int64_t) {}
};
template <class Sum, class = void>
struct RestsOfSum {
  using type = NoRests;
};
template <class Sum>
struct RestsOfSum<Sum, std::void_t<typename Sum::Rests>> {
  using type = typename Sum::Rests;
};
template <class K>
using RestsOf = typename RestsOfSum<Narrow<K>>::type;

constexpr int kSumsBeside = 8;                      // that registers hold
constexpr int kBeside = 2, kInPlaceBeside = 4;      // tokens of a step: of codes decoded before, and of those decoded for it
constexpr int64_t kMostInPlace = 16;                // tokens for which that is done anew for each four of them
constexpr int kFetching = 8;                        // tokens in whose passes the next block is fetched
constexpr int64_t kBlockChunks = 16;                // chunks of a block: 16 KiB, once decoded
constexpr int64_t kInPlaceChunks = 64;              // of one that is not decoded
constexpr int64_t kFewChunks = 8, kFewTokens = 16;  // the same of few tokens, of whose activations a block needs less memory

// Codes that are decoded by so few instructions that they may be for every four tokens.
template <class K, bool spans = kHasSpans<typename K::Sum>>
constexpr bool kDecodesFast = false;
template <class K>
constexpr bool kDecodesFast<K, true> =
    std::is_same_v<typename Narrow<K>::X, int8_t> && (K::kPlanes == 2 || part_count(K::kBits) == 1);

// A run of segments, or a part of a long one, of T row groups, with what all tokens share; H tokens take part in a step.
template <class K, int H>
struct Block {
  static constexpr int P = K::kPlanes, kOnce = kSumsBeside / H / P;  // row groups of a step
  static constexpr bool kInPlace = H == kInPlaceBeside;
  static constexpr int T = kInPlace ? kGroupsPerTile : kOnce;
  static constexpr int64_t kChunks = kInPlace ? kInPlaceChunks : kBlockChunks;
  static constexpr float kCentre = Narrow<K>::kCentre * (P == 2 ? 17 : 1);
  static constexpr bool kBothWays = K::kBegins >= 0 && P == 1 && Narrow<K>::kStarts > 0;
  // Lines of a tile's next block that each of the first passes through one fetches for every chunk: all at once would be
  // waited for.
  static constexpr int kTiles = T / kGroupsPerTile, kPasses = kFetching / H * (T / kOnce) / kTiles;
  static constexpr int kLines = K::kBits > 1 ? (K::kBits + kPasses - 1) / kPasses : 0;

  const SegmentTask& task;
  const K kernel;
  Settling how;
  bool mirrored;           // whether codes are counted from the largest down, by which sums begin with nothing
  float origin;            // what of each activation sums begin with
  int64_t first, chunks;   // of the row; of each segment but the last one
  int64_t all, segments;   // chunks and segments of the block
  int64_t index, activation[kChunks];  // of the first segment; of each one's scales of activations
  const uint8_t *codes_at, *from;  // codes of the first row group, and what is multiplied: those, or decoded ones
  alignas(64) uint8_t codes[kInPlace ? 1 : kBlockChunks * 8][T][P][kLanes * 4];
  Line line[kChunks][T];
  float totals[kRoundedTokens][T][kLanes];

  explicit FEWBIT_INLINE Block(const SegmentTask& t)
      : task(t), kernel(t), how(settling(t)), mirrored(!kInPlace && kBothWays && kernel.origin + kCentre == -1) {}

  // What one pass fetches first.
  FEWBIT_INLINE const uint8_t* next(int64_t group, int64_t token) const {
    if (token >= kFetching) return nullptr;
    const int64_t pass = token / H * (T / kOnce) + group / kOnce, tile = task.chunks * K::kBits * 64;
    const int64_t over = first + all == task.chunks ? (kTiles - 1) * tile : 0;  // the strip behind this one
    return codes_at + all * K::kBits * 64 + pass / kPasses * tile + over + pass % kPasses * kLines * 64;
  }
};

// Decodes all of a block.
template <class K, int H>
FEWBIT_INLINE void decode_all(Block<K, H>& block, const SegmentStrip& rows) {
  constexpr int P = K::kPlanes;
  const U other = repeat(block.mirrored ? 0x01010101u * (2 * Narrow<K>::kCentre + 1) : 0);
  for (int t = 0; t < block.T; t++) {
    const uint8_t* codes = Group(block.task, rows.at(t)).codes + block.first * K::kBits * 64;
    Held<K::kBits> held;
    for (int64_t c = 0; c < block.all; c++, codes += K::kBits * 64) {
#pragma GCC unroll 8
      for (int g = 0; g < 8; g++) {
        U plane[P];
        held.advance(codes, g);
        block.kernel.split(held.quad(g), plane);
        if constexpr (block.kBothWays) plane[0] = Narrow<K>::mirrored(plane[0], other);
        for (int p = 0; p < P; p++) store_lanes(block.codes[c * 8 + g][t][p], plane[p]);
      }
    }
  }
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
    next += K::kBits * 64;
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

// The same of a chunk of a tile, or of two planes, where it stands.
template <class K, int groups, int T>
FEWBIT_INLINE void multiply(const K& kernel, const Place<K>& at, U (&narrow)[T][kInPlaceBeside]) {
  constexpr int P = K::kPlanes;
  Held<K::kBits> held[T / P];
#pragma GCC unroll 8
  for (int g = 0; g < groups; g++) {
    U u[T / P][P];
#pragma GCC unroll 2
    for (int t = 0; t < T / P; t++) {
      held[t].advance(at.codes + t * kLanes * 4, g);
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
  constexpr int64_t bytes = H == kInPlaceBeside ? K::kBits * 64 : kGroups * V * kLanes * 4;
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

template <Settling how, int T, int all, int H>
FEWBIT_INLINE void settle_spans(const U (&sum)[T][H], const Tokens<1>& tokens, const Line* line,
                                float (*totals)[all][kLanes]) {
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    const Line here = line[t];
#pragma GCC unroll 4
    for (int h = 0; h < H; h++)
      store(totals[h][t], settle<how>(tokens, h, convert(sum[t][h]), here, load(totals[h][t])));
  }
}

// Sets `sum` to that of a segment of `chunks` chunks from `first`, times H of M tokens; `sums`: of their activations.
template <int M, class K, int H, int T>
FEWBIT_INLINE void sum_segment(const Block<K, H>& block, Place<K>& at, int64_t first, int64_t chunks, const RestsOf<K>& rests,
                               const float* sums, U (&sum)[T][H]) {
  using Sum = Narrow<K>;
  U narrow[T * K::kPlanes][H], wide[T][H], begins[H];
  const auto begin = [&](int h) {
    if constexpr (K::kBegins < 0) return Sum::start(nullptr);
    else return Sum::integer(multiply(broadcast(sums[h]), broadcast(block.origin)));
  };
  if constexpr (Sum::kStarts == 0)
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) begins[h] = begin(h);
  const uint8_t* const codes = at.codes;
  const bool flushed = multiply_spans<M, Block<K, H>::kLines>(block.kernel, at, chunks, begins, narrow, wide);
#pragma GCC unroll 4
  for (int h = 0; h < H; h++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t][h] = widened<K>(narrow, t, h);
  if constexpr (Sum::kStarts > 0 && K::kBegins >= 0)
    if (block.origin != 0)
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        const U here = begin(h);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sum[t][h] = Sum::add(sum[t][h], here);
      }
  if (flushed) add_all<K>(sum, wide);
  if constexpr (!std::is_same_v<RestsOf<K>, NoRests>)
    rests.template visit<H, Sum::rests_beside(H)>(
        first, chunks, codes, Block<K, H>::T * kLanes * 4,
        [&](int h, const auto* x, const uint8_t* u) { Sum::add_rest(sum, h, x, u); });
}

// Multiplies the block's row groups from `group` by H of M tokens from `token`, and adds to their totals.
template <int M, class K, int H>
FEWBIT_INLINE void add_some(Block<K, H>& block, int64_t group, int64_t token, int64_t m) {
  using Sum = Narrow<K>;
  const SegmentTask& task = block.task;
  const int64_t chunk = token * task.chunks + block.first * M + m;
  Place<K> at = {block.from + group * kLanes * 4, static_cast<const typename Sum::X*>(task.activations) + chunk * 32,
                 task.starts + chunk * Sum::kStarts, block.next(group, token + m)};
  Tokens<1> tokens(task, Segment(task), token + m);
  const float* scale = tokens.scale;
  tokens.sum = task.sums + token * task.segments + block.index * M + m;
  const RestsOf<K> rests(task, token + m);
  auto* totals = reinterpret_cast<float(*)[Block<K, H>::T][kLanes]>(block.totals[token + m][group]);
#pragma GCC unroll 1
  for (int64_t s = 0; s < block.segments; s++, tokens.sum += M) {
    U sum[Block<K, H>::kOnce][H];
    const int64_t chunks = s + 1 < block.segments ? block.chunks : block.all - s * block.chunks;
    sum_segment<M>(block, at, block.first + s * block.chunks, chunks, rests, tokens.sum, sum);
    tokens.scale = scale + block.activation[s];
    switch (block.how) {
      case kPlain: settle_spans<kPlain>(sum, tokens, block.line[s] + group, totals); break;
      case kShifted: settle_spans<kShifted>(sum, tokens, block.line[s] + group, totals); break;
      case kScaled: settle_spans<kScaled>(sum, tokens, block.line[s] + group, totals); break;
      case kScaledShifted: settle_spans<kScaledShifted>(sum, tokens, block.line[s] + group, totals); break;
      case kPartly: settle_spans<kPartly>(sum, tokens, block.line[s] + group, totals); break;
    }
  }
}

// The same for M tokens. A call of its own: what surrounds it would keep registers.
template <int M, class K, int H>
__attribute__((noinline)) void add_block(Block<K, H>& block, int64_t token) {
#pragma GCC unroll 1
  for (int64_t m = 0; m < M; m += H)
    for (int64_t group = 0; group < block.T; group += block.kOnce) add_some<M>(block, group, token, m);
}

// Decodes the block that begins with `segment`, and goes on to the segment behind it.
template <class K, int H>
FEWBIT_INLINE void decode_block(Block<K, H>& block, const SegmentStrip& rows, Segment& segment) {
  const SegmentTask& task = block.task;
  block.index = segment.index;
  block.codes_at = Group(task, rows.group).codes + block.first * K::kBits * 64;
  block.from = block.kInPlace ? block.codes_at : block.codes[0][0][0];
  if constexpr (!Block<K, H>::kInPlace) decode_all(block, rows);
  for (int64_t s = 0; s < block.segments; s++) {
    for (int t = 0; t < block.T; t++) {
      Line& line = block.line[s][t];
      line = Line(task, block.kernel.step, Group(task, rows.at(t)).parameters + segment.weight);
      if (block.mirrored) line.scale = multiply(line.scale, broadcast(-1.0f));
    }
    block.activation[s] = segment.activation;
    if (block.how != kPartly) segment.advance(task);
  }
}

// Fetches where a block's outputs of M tokens from `token` go, while the last products are computed.
template <int M, class K, int H>
FEWBIT_INLINE void prefetch_outputs(const Block<K, H>& block, const SegmentStrip& rows, int64_t token) {
  const SegmentTask& task = block.task;
  if (task.y_dtype != FEWBIT_FLOAT32) return;
  for (int64_t m = token; m < token + M && m < rows.tokens; m++) {
    const float* y = static_cast<const float*>(task.y) + m * task.y_stride + Group(task, rows.group).row;
    for (int64_t i = 0; i < block.T * kLanes; i += 16) __builtin_prefetch(y + i, 1);
  }
}

// Row groups x all tokens, M at a time, block by block; a segment that is a long row is settled at the end.
template <class K, int H, int M>
void spans(const SegmentTask& task, const SegmentStrip& rows) {
  constexpr int T = Block<K, H>::T;
  const int64_t tokens = rows.tokens, padded = (tokens + M - 1) / M * M;
  const bool long_row = task.segment_chunks > kBlockChunks;
  const bool few = !Block<K, H>::kInPlace && tokens <= kFewTokens && task.segment_chunks <= kFewChunks;
  const int64_t room = long_row ? kBlockChunks : few ? kFewChunks : Block<K, H>::kChunks;
  Block<K, H> block(task);
  if (long_row) block.how = kPartly;
  for (int64_t m = 0; m < padded; m++)
    for (int t = 0; t < T; t++) store(block.totals[m][t], broadcast(0.0f));
  block.chunks = long_row ? kBlockChunks : task.segment_chunks;
  const int64_t most = room / block.chunks * block.chunks;
  Segment segment(task);
  for (block.first = 0; block.first < task.chunks; block.first += block.all) {
    block.origin = !block.mirrored && (!long_row || block.first == 0) ? block.kernel.origin + block.kCentre : 0;
    block.all = task.chunks - block.first < most ? task.chunks - block.first : most;
    block.segments = (block.all + block.chunks - 1) / block.chunks;
    decode_block(block, rows, segment);
    for (int64_t token = 0; token < padded; token += M) {
      if (block.first + block.all == task.chunks) prefetch_outputs<M>(block, rows, token);
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

template <class K, int H, int M>
FEWBIT_INLINE void strips_beside(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  for (; begin < end; begin += Block<K, H>::T) spans<K, H, M>(task, {begin, end - begin, 0, tokens});
}

template <class K, int M>
void strips_spans(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  if constexpr (M == kInPlaceBeside && kDecodesFast<K>)
    if (tokens <= kMostInPlace) return strips_beside<K, kInPlaceBeside, M>(task, begin, end, tokens);
  strips_beside<K, kBeside, M>(task, begin, end, tokens);
}

}  // namespace
}  // namespace fewbit
