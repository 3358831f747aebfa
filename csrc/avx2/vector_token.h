// SPDX-License-Identifier: Apache-2.0
// Tiles of vectors of bytes x one token or two: see entries.h.
#pragma once

#include <string.h>

#include "avx2/entries.h"
#include "avx2/gather.h"

namespace fewbit {
namespace {

constexpr int32_t kJointBits = 12;  // of two indices that are read as one: their book of bytes fills the first-level cache

template <int COUNT, int M, int WIDTH>
FEWBIT_APART void begin_codes(const Int8VectorTask& task, int64_t token, float (&totals)[COUNT][M][WIDTH]) {
  memset(totals, 0, sizeof totals);
  for (auto& of : totals)
    for (int m = 0; m < M; m++)
      memcpy(of[m], task.start + (token + m) * task.dim, static_cast<size_t>(task.dim) * sizeof(float));
}

// Scales the sums of a segment, and adds them to their totals.
template <class Number, int COUNT, int M, int WIDTH>
FEWBIT_APART void settle_codes(const Int8VectorTask& task, const VectorSegment& segment, int64_t token,
                               const Number (&sums)[COUNT][M][WIDTH], float (&totals)[COUNT][M][WIDTH]) {
  float factor[M][WIDTH] = {};
  for (int m = 0; m < M; m++)
    for (int64_t d = 0; d < task.dim; d++) factor[m][d] = segment.factor(token + m, d);
  for (int u = 0; u < COUNT; u++)
    for (int m = 0; m < M; m++)
      for (int d = 0; d < WIDTH; d++)
        totals[u][m][d] = __builtin_fmaf(factor[m][d], static_cast<float>(sums[u][m][d]), totals[u][m][d]);
}

template <int COUNT, int M, int WIDTH>
FEWBIT_APART void put_totals(const Int8VectorTask& task, int64_t code, int64_t token,
                             const float (&totals)[COUNT][M][WIDTH]) {
  for (int u = 0; u < COUNT && code + u < task.rows; u++)
    for (int m = 0; m < M; m++) put_code(task, code + u, token + m, totals[u][m]);
}

// Some codes of wide books, of more than eight rows, x one token.
void long_codes(const Int8VectorTask& task, int64_t code, int64_t token) {
  using Entry = ByteEntry<16>;
  constexpr int B = kBeside<Entry>;
  float totals[B][1][16];
  begin_codes(task, token, totals);
  const auto* x = activations_of<int16_t>(task, 0) + token * 32;
  const int64_t apart = task.together * 32;
  const int64_t bytes = (task.bits + task.residual_bits) * 4, next = task.chunks * bytes;
  const uint8_t* codes = wide_codes_of(task, code);
  VectorSegment segment(task);
  for (int64_t s = 0; s < task.segments; s++, segment.next()) {
    int32_t sums[B][1][16] = {};
    const auto add = [&](int32_t bits, const uint8_t* from, const uint8_t* book) {
      with_bits(bits, [&](auto at) { add_wide_chunks<Entry>(at, from, next, bytes, book, x, apart, segment.chunks, sums[0][0]); });
    };
    add(task.bits, codes, segment.book);
    if (task.books == 2) add(task.residual_bits, codes + task.bits * 4, segment.book + (int64_t{16} << task.bits));
    settle_codes(task, segment, token, sums, totals);
    x += segment.chunks * apart, codes += segment.chunks * bytes;
  }
  put_totals(task, code, token, totals);
}

// Books that are not wide, an entry beside the next. JOINT: of both books one, whose entries are the sums of theirs.
template <class Entry, bool JOINT>
struct Entries {
  using T = typename Entry::Stored;
  static constexpr int kWidth = Entry::kWidth, kRead = 256;
  alignas(32) T of[JOINT ? 1 : 2][Entry::kEntries * kWidth];
  const uint8_t* held = nullptr;

  void enter(const Int8VectorTask& task, const uint8_t* book) {
    if (book == held) return;
    held = book;
    if constexpr (JOINT) {
      T apart[2][kRead * kWidth];
      read(task, book, apart);
      T* out = of[0];
      for (int j = 0; j < 1 << task.residual_bits; j++)
        for (int i = 0; i < 1 << task.bits; i++, out += kWidth)
          for (int d = 0; d < kWidth; d++) out[d] = static_cast<T>(apart[0][i * kWidth + d] + apart[1][j * kWidth + d]);
    } else {
      read(task, book, of);
    }
  }

 private:
  static FEWBIT_APART void read(const Int8VectorTask& task, const uint8_t* book, T (&out)[2][kRead * kWidth]) {
    for (int64_t b = 0; b < task.books; b++, book += task.dim * task.entries)
      for (int64_t i = 0; i < task.entries; i++)
        for (int64_t d = 0; d < kWidth; d++) out[b][i * kWidth + d] = d < task.dim ? book[d * task.entries + i] : T{};
  }
};

// Tokens [token, token + M).
template <class Entry, bool JOINT, int M>
void narrow_tiles(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t token) {
  Entries<Entry, JOINT> books;
  Offsets offsets;
  typename Entry::Number x[M][kSegment], sums[16][M][Entry::kWidth];
  for (int64_t tile = tile_begin; tile < tile_end; tile++) {
    float totals[16][M][Entry::kWidth];
    begin_codes(task, token, totals);
    const uint8_t* codes = codes_of(task, tile);
    const auto* rounded = activations_of<int16_t>(task, 0) + token * 32;
    VectorSegment segment(task);
    for (int64_t s = 0; s < task.segments; s++, segment.next()) {
      if (segment.enters) books.enter(task, segment.book);
      offsets.enter(task, codes, segment.chunks, Entry::kShift, JOINT);
      codes += segment.chunks * chunk_bytes(task);
      for (int64_t c = 0; c < segment.chunks; c++, rounded += task.together * 32)
        for (int m = 0; m < M; m++)
          for (int64_t i = 0; i < 32; i++) x[m][c * 32 + i] = rounded[m * 32 + i];
      memset(sums, 0, sizeof sums);
      for (int u = 0; u < 16; u += kBeside<Entry, M>)
        for (int64_t b = 0; b < (JOINT ? 1 : task.books); b++)
          add_quads<Entry, M>(books.of[b], offsets.of[b][0] + place_of(u / 4, 0), x[0], kSegment, segment.chunks * 8, sums[u][0]);
      settle_codes(task, segment, token, sums, totals);
    }
    put_totals(task, tile * 16, token, totals);
  }
}

template <class Entry, bool JOINT>
void narrow_tokens(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  if (kBeside<Entry, 2> >= 4 && tokens == 2)
    narrow_tiles<Entry, JOINT, kBeside<Entry, 2> >= 4 ? 2 : 1>(task, tile_begin, tile_end, 0);
  else
    for (int64_t token = 0; token < tokens; token++) narrow_tiles<Entry, JOINT, 1>(task, tile_begin, tile_end, token);
}

// Two books are made one where that takes few additions beside the codes of a block.
template <int WIDTH>
void narrow(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int32_t bits = task.bits + task.residual_bits;
  const int64_t columns = task.block_segments * task.segment_chunks * 32;
  if (task.books == 1 || bits > kJointBits || columns * 4 < int64_t{1} << bits)
    return narrow_tokens<FloatEntry<WIDTH>, false>(task, tile_begin, tile_end, tokens);
  if (1 << bits <= FloatEntry<WIDTH>::kEntries)
    return narrow_tokens<FloatEntry<WIDTH>, true>(task, tile_begin, tile_end, tokens);
  narrow_tokens<ByteEntry<WIDTH == 4 ? 8 : WIDTH>, true>(task, tile_begin, tile_end, tokens);
}

void narrow(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const auto of = task.dim <= 4 ? narrow<4> : task.dim <= 8 ? narrow<8> : narrow<16>;
  of(task, tile_begin, tile_end, tokens);
}

}  // namespace
}  // namespace fewbit
