// SPDX-License-Identifier: Apache-2.0
// Tiles of vectors of bytes x one token: see entries.h.
#pragma once

#include <string.h>

#include "avx2/entries.h"
#include "avx2/gather.h"

namespace fewbit {
namespace {

constexpr int32_t kJointBits = 12;  // of two indices that are read as one: their book of bytes fills the first-level cache

template <int COUNT, int WIDTH>
void begin_codes(const Int8VectorTask& task, float (&totals)[COUNT][WIDTH]) {
  memset(totals, 0, sizeof totals);
  for (auto& of : totals) memcpy(of, task.start, static_cast<size_t>(task.dim) * sizeof(float));
}

// Scales the sums of a segment, and adds them to their totals.
template <class Number, int COUNT, int WIDTH>
void settle_codes(const Int8VectorTask& task, const VectorSegment& segment, const Number (&sums)[COUNT][WIDTH],
                  float (&totals)[COUNT][WIDTH]) {
  float factor[WIDTH] = {};
  for (int64_t d = 0; d < task.dim; d++) factor[d] = segment.factor(0, d);
  for (int u = 0; u < COUNT; u++)
    for (int d = 0; d < WIDTH; d++) totals[u][d] = __builtin_fmaf(factor[d], static_cast<float>(sums[u][d]), totals[u][d]);
}

// Some codes of wide books, of more than eight rows.
void long_codes(const Int8VectorTask& task, int64_t code) {
  using Entry = ByteEntry<16>;
  constexpr int B = kBeside<Entry>;
  float totals[B][16];
  begin_codes(task, totals);
  const auto* x = activations_of<int16_t>(task, 0);
  const int64_t bytes = (task.bits + task.residual_bits) * 4, next = task.chunks * bytes;
  const uint8_t* codes = wide_codes_of(task, code);
  VectorSegment segment(task);
  for (int64_t s = 0; s < task.segments; s++, segment.next()) {
    int32_t sums[B][16] = {};
    const auto add = [&](int32_t bits, const uint8_t* from, const uint8_t* book) {
      with_bits(bits, [&](auto at) { add_wide_chunks<Entry>(at, from, next, bytes, book, x, segment.chunks, sums[0]); });
    };
    add(task.bits, codes, segment.book);
    if (task.books == 2) add(task.residual_bits, codes + task.bits * 4, segment.book + (int64_t{16} << task.bits));
    settle_codes(task, segment, sums, totals);
    x += segment.chunks * 32, codes += segment.chunks * bytes;
  }
  for (int u = 0; u < B && code + u < task.rows; u++) put_code(task, code + u, 0, totals[u]);
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
  static void read(const Int8VectorTask& task, const uint8_t* book, T (&out)[2][kRead * kWidth]) {
    for (int64_t b = 0; b < task.books; b++, book += task.dim * task.entries)
      for (int64_t i = 0; i < task.entries; i++)
        for (int64_t d = 0; d < kWidth; d++) out[b][i * kWidth + d] = d < task.dim ? book[d * task.entries + i] : T{};
  }
};

template <class Entry, bool JOINT>
void narrow_tiles(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end) {
  Entries<Entry, JOINT> books;
  Offsets offsets;
  typename Entry::Number x[kSegment], sums[16][Entry::kWidth];
  for (int64_t tile = tile_begin; tile < tile_end; tile++) {
    float totals[16][Entry::kWidth];
    begin_codes(task, totals);
    const uint8_t* codes = codes_of(task, tile);
    const auto* rounded = activations_of<int16_t>(task, 0);
    VectorSegment segment(task);
    for (int64_t s = 0; s < task.segments; s++, segment.next()) {
      if (segment.enters) books.enter(task, segment.book);
      offsets.enter(task, codes, segment.chunks, Entry::kShift, JOINT);
      for (int64_t i = 0; i < segment.chunks * 32; i++) x[i] = rounded[i];
      memset(sums, 0, sizeof sums);
      for (int u = 0; u < 16; u += kBeside<Entry>)
        for (int64_t b = 0; b < (JOINT ? 1 : task.books); b++)
          add_quads<Entry>(books.of[b], offsets.of[b][0] + place_of(u / 4, 0), x, segment.chunks * 8, sums[u]);
      settle_codes(task, segment, sums, totals);
      codes += segment.chunks * chunk_bytes(task), rounded += segment.chunks * 32;
    }
    for (int64_t u = 0; u < 16 && tile * 16 + u < task.rows; u++) put_code(task, tile * 16 + u, 0, totals[u]);
  }
}

// Two books are made one where that takes few additions beside the codes of a block.
template <int WIDTH>
void narrow_alone(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end) {
  const int32_t bits = task.bits + task.residual_bits;
  const int64_t columns = task.block_segments * task.segment_chunks * 32;
  if (task.books == 1 || bits > kJointBits || columns * 4 < int64_t{1} << bits)
    return narrow_tiles<FloatEntry<WIDTH>, false>(task, tile_begin, tile_end);
  if (1 << bits <= FloatEntry<WIDTH>::kEntries) return narrow_tiles<FloatEntry<WIDTH>, true>(task, tile_begin, tile_end);
  narrow_tiles<ByteEntry<WIDTH == 4 ? 8 : WIDTH>, true>(task, tile_begin, tile_end);
}

void narrow_alone(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end) {
  const auto of = task.dim <= 4 ? narrow_alone<4> : task.dim <= 8 ? narrow_alone<8> : narrow_alone<16>;
  of(task, tile_begin, tile_end);
}

}  // namespace
}  // namespace fewbit
