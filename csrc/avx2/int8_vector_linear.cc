// SPDX-License-Identifier: Apache-2.0
// Vectors of bytes from books of any size: an entry is one load. A register holds those of two neighbouring columns of a
// code and of the next code; vpshufb interleaves and widens them, so that one vpmaddwd multiplies four rows of either code
// by two activations that are repeated. Exactly: pairs of products of bytes are more than int16 holds. Entries of 16 bytes
// are taken as two halves, one after the other. One token: vector_token.h, but for wide books of at most eight rows.
#include <string.h>

#include <type_traits>

#include "avx2/simd.h"

#include "avx2/gather.h"
#include "avx2/vector_token.h"
#include "core/inline.h"
#include "core/int8_vector.h"
#include "core/tile_indices.h"

namespace fewbit {
namespace {

constexpr int64_t kMost = 4;                    // tokens beside one another, whose sums registers hold
constexpr int64_t kEntries = 256, kWidth = 16;  // of a book that is not wide, at most

using X = int16_t;

// Part of a segment of two codes: of each two columns rows 0 to 3 of both codes, then rows 4 to 7.
template <int HALVES>
struct Words {
  U of[kPart * 16][HALVES];
};

// Adds the products of two columns with M tokens.
template <int M, int HALVES>
FEWBIT_INLINE void add_words(const U (&words)[HALVES], const X* x, U (&sum)[M][HALVES]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    const U both = _mm256_set1_epi32(word_at<int32_t>(x + m * 32));
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; h++) {
      sum[m][h] = _mm256_add_epi32(sum[m][h], _mm256_madd_epi16(words[h], both));
      if (M == 1) asm("" : "+x"(sum[m][h]));  // GCC would put off additions, and keep products in memory for that
    }
  }
}

// Adds the products of rows of two codes with one token. A call of its own: what surrounds it would keep registers that its
// sums need.
template <class Source, int HALVES>
FEWBIT_APART void add_chunks(Source source, const X* x, int64_t chunks, U (&total)[1][HALVES]) {
  U sum[1][HALVES], orders[HALVES];
  for (int h = 0; h < HALVES; h++) orders[h] = order(h), sum[0][h] = total[0][h];
  for (const X* end = x + chunks * 32; x < end; x += 32, source.next()) {
    source.enter();
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      U pairs[4];
      source(g, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        U words[HALVES];
        for (int h = 0; h < HALVES; h++) words[h] = _mm256_shuffle_epi8(pairs[i], orders[h]);
        add_words<1, HALVES>(words, x + g * 8 + i * 2, sum);
      }
    }
  }
  for (int h = 0; h < HALVES; h++) total[0][h] = sum[0][h];
}

// Writes a part of a segment of two codes as words. ADD: adds to those of another book.
template <bool ADD, class Source, int HALVES>
FEWBIT_APART void decode_chunks(Source source, int64_t chunks, Words<HALVES>& out) {
  U orders[HALVES];
  for (int h = 0; h < HALVES; h++) orders[h] = order(h);
  U(*to)[HALVES] = out.of;
  for (int64_t c = 0; c < chunks; c++, source.next()) {
    source.enter();
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++, to += 4) {
      U pairs[4];
      source(g, pairs);
      for (int i = 0; i < 4; i++)
        for (int h = 0; h < HALVES; h++) {
          const U words = _mm256_shuffle_epi8(pairs[i], orders[h]);
          to[i][h] = ADD ? _mm256_add_epi16(to[i][h], words) : words;
        }
    }
  }
}

// Adds its products with M tokens. A call of its own, as that above.
template <int M, int HALVES>
FEWBIT_APART void add_part(const Words<HALVES>& words, const X* x, int64_t chunks, U (&total)[M][HALVES]) {
  U sum[M][HALVES];
#pragma GCC unroll 8
  for (int i = 0; i < M * HALVES; i++) sum[i / HALVES][i % HALVES] = total[i / HALVES][i % HALVES];
  const U(*from)[HALVES] = words.of;
  for (const X* end = x + chunks * M * 32; x < end; x += M * 32)
#pragma GCC unroll 1  // else as above
    for (int i = 0; i < 32; i += 2, from++) add_words<M, HALVES>(*from, x + i, sum);
#pragma GCC unroll 8
  for (int i = 0; i < M * HALVES; i++) total[i / HALVES][i % HALVES] = sum[i / HALVES][i % HALVES];
}

template <int M, int HALVES>
struct Sums {
  static constexpr int kHalves = HALVES;
  U of[M][HALVES] = {};
};

// Totals of two codes x M tokens x all rows.
template <int M>
using Totals = float[2][M][16];

// Scales the sums of a segment, rows [d, d + 4 HALVES) of two codes, and adds them to the totals.
template <int M, int HALVES>
FEWBIT_INLINE void settle(const Int8VectorTask& task, const VectorSegment& segment, int64_t token, int64_t d,
                          const U (&sum)[M][HALVES], Totals<M>& totals) {
  float step[8] = {};
  for (int64_t i = 0; i < 8 && d + i < task.dim; i++) step[i] = segment.step[d + i];
  const F steps = load(step);
  for (int m = 0; m < M; m++) {
    const F factor = multiply(steps, broadcast(segment.x_scale[(token + m) * task.x_blocks]));
    const U low = sum[m][0], high = HALVES == 2 ? sum[m][HALVES - 1] : _mm256_setzero_si256();
    const U of[2] = {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
    for (int i = 0; i < 2; i++) {
      float* here = totals[i][m] + d;
      store(here, fused(factor, convert(of[i]), load(here)));
    }
  }
}

// What sums begin with.
template <int M>
FEWBIT_INLINE void begin(const Int8VectorTask& task, int64_t token, Totals<M>& totals) {
  memset(totals, 0, sizeof totals);
  for (int i = 0; i < 2; i++)
    for (int m = 0; m < M; m++)
      memcpy(totals[i][m], task.start + (token + m) * task.dim, static_cast<size_t>(task.dim) * sizeof(float));
}

template <int M>
FEWBIT_INLINE void put_codes(const Int8VectorTask& task, int64_t code, int64_t token, int64_t tokens, const Totals<M>& totals) {
  for (int i = 0; i < 2 && code + i < task.rows; i++)
    for (int m = 0; m < M && m < tokens; m++) put_code(task, code + i, token + m, totals[i][m]);
}

// Calls `work(first, book)` for each book of a wide code from chunk `chunk`, rows from `d`: whether it is the first, and what
// reads it.
template <int WIDTH, class Work>
FEWBIT_INLINE void each_book(const Int8VectorTask& task, const uint8_t* book, int64_t code, int64_t chunk, Work work) {
  const int64_t bytes = (task.bits + task.residual_bits) * 4, next = task.chunks * bytes;
  const uint8_t* codes = wide_codes_of(task, code) + chunk * bytes;
  with_bits(task.bits, [&](auto at) { work(std::true_type{}, wide<WIDTH>(at, codes, book, next, bytes)); });
  codes += task.bits * 4, book += WIDTH << task.bits;
  if (task.books == 2)
    with_bits(task.residual_bits, [&](auto at) { work(std::false_type{}, wide<WIDTH>(at, codes, book, next, bytes)); });
}

// Calls `work(d, sum)` for every eight rows [d, d + 8), or the last four, with the type of their sums.
template <int M, class Work>
FEWBIT_INLINE void each_rows(const Int8VectorTask& task, Work work) {
  for (int64_t d = 0; d < task.dim; d += 8) {
    if (d + 4 < task.dim) work(d, Sums<M, 2>{});
    else work(d, Sums<M, 1>{});
  }
}

// Two codes of wide books, of at most eight rows, x one token. Each book is a pass of its own: sums of integers may be split.
void wide_codes(const Int8VectorTask& task, int64_t code) {
  Totals<1> totals;
  begin<1>(task, 0, totals);
  const X* x = activations_of<X>(task, 0);
  VectorSegment segment(task);
  for (int64_t s = 0, chunk = 0; s < task.segments; s++, chunk += segment.chunks, segment.next())
    each_rows<1>(task, [&](int64_t d, auto sums) {
      each_book<8>(task, segment.book + d, code, chunk,
                   [&](auto, const auto& book) { add_chunks(book, x + chunk * 32, segment.chunks, sums.of); });
      settle(task, segment, 0, d, sums.of, totals);
    });
  put_codes<1>(task, code, 0, 1, totals);
}

// Books of at most 256 entries, an entry beside the next.
struct Books {
  alignas(32) uint8_t bytes[2][kEntries * kWidth];
  const uint8_t* held = nullptr;

  void enter(const Int8VectorTask& task, const uint8_t* book) {
    if (book == held) return;
    held = book;
    for (int64_t b = 0; b < task.books; b++)
      for (int64_t d = 0; d < task.dim; d++, book += task.entries)
        for (int64_t i = 0; i < task.entries; i++) bytes[b][i * task.width + d] = book[i];
  }
};

// Indices of a tile's segment: (books, groups of four columns, 16 codes of these).
struct Indices {
  alignas(32) uint8_t bytes[2][kSegment / 4][64];

  void enter(const Int8VectorTask& task, const uint8_t* codes, int64_t chunks) {
    const int32_t bits[2] = {task.bits, task.residual_bits};
    for (int64_t c = 0; c < chunks; c++)
      for (int64_t b = 0; b < task.books; codes += bits[b] * 64, b++) {
        decode(bits[b], codes, bytes[b] + c * 8);
        for (int64_t i = 0; bits[b] == 6 && i < 8 * 64; i += 32) {
          uint8_t* here = bytes[b][c * 8] + i;
          store_lanes(here, mask(load_lanes(here), 0x3f3f3f3fu));
        }
      }
  }
};

// Writes chunks [chunk, chunk + chunks) of rows from `d` of two codes as words.
template <int WIDTH, int HALVES>
void decode_part(const Int8VectorTask& task, const VectorSegment& segment, Books& books, int64_t code, int64_t d, int64_t chunk,
                 int64_t chunks, Words<HALVES>& out) {
  if (task.wide)
    return each_book<WIDTH>(task, segment.book + d, code, chunk, [&](auto first, const auto& book) {
      decode_chunks<!decltype(first)::value>(book, chunks, out);
    });
  Indices indices;
  books.enter(task, segment.book);
  indices.enter(task, codes_of(task, code / 16) + chunk * chunk_bytes(task), chunks);
  const Narrow<WIDTH> one{indices.bytes[0][0] + code % 16 * 4, books.bytes[0] + d};
  const Narrow<WIDTH> two{indices.bytes[1][0] + code % 16 * 4, books.bytes[1] + d};
  if (task.books == 1) decode_chunks<false>(one, chunks, out);
  else decode_chunks<false>(Both<WIDTH>{one, two}, chunks, out);
}

// Two codes x all tokens, M at a time: entries are looked up once for them, a part of a segment at a time.
template <int WIDTH, int M>
void many_codes(const Int8VectorTask& task, Books& books, int64_t code, int64_t tokens) {
  Totals<M> totals[kRoundedTokens / M];
  for (int64_t token = 0; token < tokens; token += M) begin<M>(task, token, totals[token / M]);
  each_rows<M>(task, [&](int64_t d, auto none) {
    constexpr int kHalves = decltype(none)::kHalves;
    Words<kHalves> words;
    U sums[kRoundedTokens / M][M][kHalves];
    VectorSegment segment(task);
    for (int64_t s = 0, chunk = 0; s < task.segments; s++, segment.next()) {
      for (int64_t token = 0; token < tokens; token += M) memset(sums[token / M], 0, sizeof sums[0]);
      for (int64_t left = segment.chunks, chunks; left > 0; left -= chunks, chunk += chunks) {
        chunks = left < kPart ? left : kPart;
        decode_part<WIDTH>(task, segment, books, code, d, chunk, chunks, words);
        for (int64_t token = 0; token < tokens; token += M)
          add_part<M, kHalves>(words, activations_of<X>(task, token) + chunk * M * 32, chunks, sums[token / M]);
      }
      for (int64_t token = 0; token < tokens; token += M)
        settle<M, kHalves>(task, segment, token, d, sums[token / M], totals[token / M]);
    }
  });
  for (int64_t token = 0; token < tokens; token += M) put_codes<M>(task, code, token, tokens - token, totals[token / M]);
}

template <int WIDTH>
void tiles(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  Books books;
  const int64_t end = tile_end * 16 < task.rows ? tile_end * 16 : task.rows;
  for (int64_t code = tile_begin * 16; code < end; code += 2) {
    if (task.together == 2) many_codes<WIDTH, 2>(task, books, code, tokens);
    else many_codes<WIDTH, kMost>(task, books, code, tokens);
  }
}

// Few tokens times wide books: one, or where codes are long two.
void wide_few(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t end = tile_end * 16 < task.rows ? tile_end * 16 : task.rows;
  if (task.width == 8)
    for (int64_t code = tile_begin * 16; code < end; code += 2) wide_codes(task, code);
  else
    for (int64_t code = tile_begin * 16; code < end; code += kBeside<ByteEntry<16>>)
      for (int64_t token = 0; token < tokens; token++) long_codes(task, code, token);
}

void run(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  if (task.together <= 2 && !task.wide) return narrow(task, tile_begin, tile_end, tokens);
  if (task.together == 1 || (task.together == 2 && task.width == 16)) return wide_few(task, tile_begin, tile_end, tokens);
  const auto of = task.width == 8 ? tiles<8> : tiles<16>;
  of(task, tile_begin, tile_end, tokens);
}

}  // namespace

const Int8VectorKernel int8_vector_linear_avx2 = {kMost, kMost, sizeof(X), round_for_vectors<X>, run};

}  // namespace fewbit
