// SPDX-License-Identifier: Apache-2.0
// Products of segments.h for many tokens: codes are decoded once for all of them. Included after an ISA's simd.h, and after
// kUnrollMany: products of how many groups of four columns a compiler may put into any order. More than 1 only where its
// order does not keep all of them alive at once.
#pragma once

#include "core/pairs.h"
#include "core/segments.h"

namespace fewbit {
namespace {

// One plane of a segment, or of a part of a long one, of T row groups, a byte a code: (groups of four columns, T, lanes of
// 4 bytes).
template <int T>
struct alignas(64) Decoded {
  uint8_t bytes[kSegment / 4][T][kLanes * 4];
};

template <class K, int T>
FEWBIT_INLINE void decode_segment(const SegmentTask& task, const K& kernel, const Strip& strip, int64_t first,
                                  int64_t chunks, Decoded<T> (&out)[K::kPlanes]) {
  for (int t = 0; t < T; t++) {
    const uint8_t* codes = strip.at(task, t).codes + first * K::kBits * 64;
    const int64_t ahead = (task.segment_chunks < kPart ? task.segment_chunks : kPart) * K::kBits * 64;
    Held<K::kBits, kInHalves<K>> held;
    for (int64_t c = 0; c < chunks; c++, codes += K::kBits * 64) {
      // What comes next, which is decoded when this one has been multiplied by all tokens.
      prefetch<K::kBits>(codes + ahead);
#pragma GCC unroll 8
      for (int g = 0; g < 8; g++) {
        U plane[K::kPlanes];
        held.advance(codes, g);
        kernel.split(held.quad(g), plane);
        for (int p = 0; p < K::kPlanes; p++) store_lanes(out[p].bytes[c * 8 + g][t], plane[p]);
      }
    }
  }
}

// Codes of 8 bits that are one plane are multiplied where they are stored.
template <class K>
constexpr bool kAsStored = K::kBits == 8 && K::kPlanes == 1 && K::kApart == 0;

// Chunks of one segment of T row groups, times all tokens, and the totals of these.
template <class K, int T>
struct Part {
  const SegmentTask& task;
  const K kernel;
  Segment segment;
  Settling how;
  int64_t first, chunks;
  const uint8_t* bytes[K::kPlanes][T];  // groups of four columns, `kStep` apart
  Line line[T];
  float sum[kRoundedTokens], start[kRoundedTokens];  // of activations; what sums of products begin with
  alignas(64) float totals[kRoundedTokens][T][kLanes];

  static constexpr int64_t kStep = kAsStored<K> ? 64 : T * kLanes * 4;

  explicit FEWBIT_INLINE Part(const SegmentTask& t) : task(t), kernel(t), segment(t), how(settling(t)) {}
};

// Unrolled: sums that are indexed by what a compiler does not know lie in memory.
template <Settling how, class K, int T, int M>
FEWBIT_INLINE void settle_all(Part<K, T>& part, const typename K::Sum (&dot)[T][M][K::kPlanes], int64_t token) {
  Tokens<M> tokens(part.task, part.segment, token);
  tokens.sum = part.sum + token;
  auto* totals = part.totals + token;
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
      store(totals[m][t], settle<how>(tokens, m, part.kernel.value(dot[t][m]), part.line[t], load(totals[m][t])));
}

// Multiplies a part by M tokens, and adds to their totals. A call of its own: what surrounds it would keep registers that its
// sums need. With few arguments: more of them would wait in vector registers, behind all products that are not done yet.
template <class K, int T, int M>
FEWBIT_APART void add_part(Part<K, T>& part, int64_t token) {
  constexpr int P = K::kPlanes;
  constexpr int64_t step = Part<K, T>::kStep;
  using Sum = typename K::Sum;
  Sum dot[T][M][P];
  const auto* x = static_cast<const typename K::X*>(part.task.activations);
  x += (token * part.task.chunks + part.first * M) * 32;
  // What the next tokens begin with; the processor foresees what follows it.
  for (int i = 0; i < M; i++) __builtin_prefetch(x + M * part.task.chunks * 32 + i * 64 / sizeof *x);
  constexpr bool pairs = kHasPairs<Sum>;
  if constexpr (pairs) multiply_pairs<K, T, M>(part.bytes, step, part.chunks, x, dot);
  if constexpr (K::kBegins >= 0)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) dot[t][m][K::kBegins].begin(broadcast(part.start[token + m]));
  for (int64_t c = 0; !pairs && c < part.chunks; c++, x += M * 32) {
    for (int begin = 0; begin < 8; begin += Sum::kGroups) {
#pragma GCC unroll kUnrollMany
      for (int g = begin; g < begin + Sum::kGroups; g++) {
        U u[T][P];
        for (int t = 0; t < T; t++)
          for (int p = 0; p < P; p++) u[t][p] = load_lanes(part.bytes[p][t] + (c * 8 + g) * step);
        for (int m = 0; m < M; m++)
          for (int t = 0; t < T; t++)
            for (int p = 0; p < P; p++) dot[t][m][p].add(u[t][p], x + m * 32 + g * 4 + p * K::kApart);
      }
      for (int t = 0; t < T; t++)
        for (int m = 0; m < M; m++)
          for (int p = 0; p < P; p++) dot[t][m][p].flush();
    }
  }
  switch (part.how) {
    case kPlain: return settle_all<kPlain>(part, dot, token);
    case kShifted: return settle_all<kShifted>(part, dot, token);
    case kScaled: return settle_all<kScaled>(part, dot, token);
    case kScaledShifted: return settle_all<kScaledShifted>(part, dot, token);
    case kPartly: return settle_all<kPartly>(part, dot, token);
  }
}

// Fetches as many chunks of 8 bits behind those at `bytes`, which `calls` calls multiply, into the first-level cache: a part
// before each of the last of them, for it to stay there.
template <int T>
FEWBIT_INLINE void prefetch_next(const uint8_t* const (&bytes)[T], int64_t chunks, int64_t call, int64_t calls) {
  const int64_t last = calls < 4 ? calls : 4, part = call - (calls - last), lines = (chunks * 8 + last - 1) / last;
  if (part < 0) return;
  for (int64_t i = chunks * 8 + part * lines, end = i + lines; i < end; i++)
    for (int t = 0; t < T; t++) __builtin_prefetch(bytes[t] + i * 64);
}

// Finds, or makes, what of a part is multiplied.
template <class K, int T>
FEWBIT_INLINE void locate(const SegmentTask& task, const Strip& rows, Part<K, T>& part,
                          Decoded<T> (&decoded)[K::kPlanes]) {
  if constexpr (!kAsStored<K>) decode_segment<K, T>(task, part.kernel, rows, part.first, part.chunks, decoded);
  for (int p = 0; p < K::kPlanes; p++)
    for (int t = 0; t < T; t++)
      part.bytes[p][t] = kAsStored<K> ? rows.at(task, t).codes + part.first * K::kBits * 64 : decoded[p].bytes[0][t];
}

// T row groups x all tokens, M at a time: each segment is decoded once and serves every token; one that is a long row, part
// by part, and settled at the end.
template <class K, int T, int M>
void decoded_once(const SegmentTask& task, int64_t group, int64_t groups, int64_t tokens) {
  const Strip rows = {group, groups, 0, tokens};
  const int64_t padded = (tokens + M - 1) / M * M;
  const bool long_row = task.segment_chunks > kPart;
  Decoded<T> decoded[K::kPlanes];
  Part<K, T> part(task);
  if (long_row) part.how = kPartly;
  for (int64_t m = 0; m < padded; m++)
    for (int t = 0; t < T; t++) store(part.totals[m][t], broadcast(0.0f));
  for (Segment& segment = part.segment; segment.index < task.segments; segment.advance(task)) {
    const int64_t first = segment.index * task.segment_chunks, left = task.chunks - first;
    const int64_t end = first + (left < task.segment_chunks ? left : task.segment_chunks);
    for (int64_t token = 0; token < padded; token += M)
      for (int m = 0; m < M; m++) part.sum[token + m] = Tokens<M>(task, segment, token).sum[m];
    for (int64_t token = 0; token < padded; token++) part.start[token] = part.kernel.origin * part.sum[token];
    for (int t = 0; t < T; t++)
      part.line[t] = Line(task, part.kernel.step, rows.at(task, t).parameters + segment.weight);
    for (part.first = first; part.first < end; part.first += kPart) {
      part.chunks = end - part.first < kPart ? end - part.first : kPart;
      locate(task, rows, part, decoded);
      for (int64_t token = 0; token < padded; token += M) {
        if constexpr (kAsStored<K>) prefetch_next(part.bytes[0], part.chunks, token / M, padded / M);
        add_part<K, T, M>(part, token);
      }
      if (long_row) memset(part.start, 0, sizeof part.start);  // sums have begun
    }
  }
  finish_totals<M>(task, rows, part.how, part.line, part.totals);
}

// Row groups that share the registers of `groups` whose codes are one plane.
template <class K>
constexpr int share(int groups) {
  return groups > K::kPlanes ? groups / K::kPlanes : 1;
}

// Row groups [begin, end) by as many as share the registers of `groups` whose codes are one plane.
template <class K, int groups, int M>
void strips_decoded(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  constexpr int T = share<K>(groups);
  for (; begin < end; begin += T) decoded_once<K, T, M>(task, begin, end - begin, tokens);
}

}  // namespace
}  // namespace fewbit
