// SPDX-License-Identifier: Apache-2.0
// Vectors of bytes from books of any size: an entry is one load. A register holds those of two neighbouring columns of a
// code and of the next code; vpshufb interleaves and widens them, so that one vpmaddwd multiplies four rows of either code
// by two activations that are repeated. Exactly: pairs of products of bytes are more than int16 holds. Entries of 16 bytes
// are taken as two halves, one after the other.
#include <string.h>

#include <type_traits>

#include "avx2/simd.h"

#include "avx2/indices.h"
#include "core/inline.h"
#include "core/int8_vector.h"
#include "core/tile_indices.h"

namespace fewbit {
namespace {

constexpr int64_t kMost = 4;                     // tokens beside one another, whose sums registers hold
constexpr int64_t kFar = 8 * 1024, kNear = 512;  // bytes that are fetched early, to the second-level cache and the first
constexpr int64_t kEntries = 256, kWidth = 16;   // of a book that is not wide, at most
constexpr int64_t kQuads = kSegment / 4;         // of columns, of a segment where books are not wide

using X = int16_t;

// Eight rows of two columns, entry beside entry.
template <int WIDTH>
FEWBIT_INLINE __m128i pair(const uint8_t* book, uint64_t first, uint64_t second) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(book + first * WIDTH));
  const auto* high = reinterpret_cast<const __m64*>(book + second * WIDTH);
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), high));
}

// Where rows 4h .. 4h+3 of a pair lie, as words of both columns in turn.
FEWBIT_INLINE U order(int h) {
  const __m128i at = _mm_setr_epi8(0, -1, 8, -1, 1, -1, 9, -1, 2, -1, 10, -1, 3, -1, 11, -1);
  return _mm256_broadcastsi128_si256(_mm_add_epi8(at, _mm_set1_epi16(static_cast<int16_t>(4 * h))));
}

// Adds the products of two columns of two codes with M tokens: rows 0 to 3 of both codes, then rows 4 to 7.
template <int M, int HALVES>
FEWBIT_INLINE void add_pairs(U pairs, const U (&orders)[HALVES], const X* x, U (&sum)[M][HALVES]) {
  U words[HALVES];
  for (int h = 0; h < HALVES; h++) words[h] = _mm256_shuffle_epi8(pairs, orders[h]);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    const U both = _mm256_set1_epi32(word_at<int32_t>(x + m * 32));
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; h++) {
      sum[m][h] = _mm256_add_epi32(sum[m][h], _mm256_madd_epi16(words[h], both));
      asm("" : "+x"(sum[m][h]));  // GCC would put off additions, and keep products in memory for that
    }
  }
}

// Two codes of a wide book.
template <int WIDTH, int BITS>
struct Wide {
  EightIndices<BITS> indices;
  const uint8_t *codes, *book;
  int64_t next_code, apart;  // bytes from a code to the next, from a chunk to the next

  FEWBIT_INLINE void enter() {
    for (int64_t i = 0; i < 2; i++) {
      __builtin_prefetch(codes + i * next_code + kFar, 0, 2);
      __builtin_prefetch(codes + i * next_code + kNear, 0, 3);
    }
  }
  FEWBIT_INLINE void next() { codes += apart; }
  // Columns 8g .. 8g+7.
  FEWBIT_INLINE void operator()(int g, U (&out)[4]) const {
    __m128i low[4], high[4];
    read(codes + g * indices.size(), low);
    read(codes + next_code + g * indices.size(), high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) out[i] = _mm256_set_m128i(high[i], low[i]);
  }

 private:
  FEWBIT_INLINE void read(const uint8_t* from, __m128i (&out)[4]) const {
    uint64_t at[8];
    indices(from, at);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) out[i] = pair<WIDTH>(book, at[2 * i], at[2 * i + 1]);
  }
};

// Likewise where indices are bytes, in groups of four columns of 16 codes.
template <int WIDTH>
struct Narrow {
  const uint8_t *at, *book;

  FEWBIT_INLINE void enter() {}
  FEWBIT_INLINE void next() { at += 8 * 64; }
  FEWBIT_INLINE void operator()(int g, U (&out)[4]) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const uint8_t* here = at + g * 128 + i / 2 * 64 + i % 2 * 2;
      out[i] = _mm256_set_m128i(pair<WIDTH>(book, here[4], here[5]), pair<WIDTH>(book, here[0], here[1]));
    }
  }
};

// The sums of entries of two books.
template <class Book>
struct Both {
  Book first, second;

  FEWBIT_INLINE void enter() { first.enter(), second.enter(); }
  FEWBIT_INLINE void next() { first.next(), second.next(); }
  FEWBIT_INLINE void operator()(int g, U (&out)[4]) const {
    U rest[4];
    first(g, out), second(g, rest);
    for (int i = 0; i < 4; i++) out[i] = _mm256_add_epi8(out[i], rest[i]);
  }
};

// Adds the products of rows of two codes with M tokens. A call of its own: what surrounds it would keep registers that its
// sums need.
template <class Source, int M, int HALVES>
__attribute__((noinline)) void add_chunks(Source source, const X* x, int64_t chunks, U (&total)[M][HALVES]) {
  U sum[M][HALVES], orders[HALVES];
  for (int h = 0; h < HALVES; h++) orders[h] = order(h);
#pragma GCC unroll 8
  for (int i = 0; i < M * HALVES; i++) sum[i / HALVES][i % HALVES] = total[i / HALVES][i % HALVES];
  for (const X* end = x + chunks * M * 32; x < end; x += M * 32, source.next()) {
    source.enter();
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      U pairs[4];
      source(g, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) add_pairs<M, HALVES>(pairs[i], orders, x + g * 8 + i * 2, sum);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M * HALVES; i++) total[i / HALVES][i % HALVES] = sum[i / HALVES][i % HALVES];
}

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
  for (int i = 0; i < 2; i++)
    for (int m = 0; m < M; m++)
      memcpy(totals[i][m], task.start + (token + m) * task.dim, static_cast<size_t>(task.dim) * sizeof(float));
}

template <int M>
FEWBIT_INLINE void put_codes(const Int8VectorTask& task, int64_t code, int64_t token, int64_t tokens, const Totals<M>& totals) {
  for (int i = 0; i < 2 && code + i < task.rows; i++)
    for (int m = 0; m < M && m < tokens; m++) put_code(task, code + i, token + m, totals[i][m]);
}

// One book of a segment.
struct Strings {
  const uint8_t *codes, *book;
  int64_t next_code, apart, chunks;
};

template <int WIDTH, int BITS, int M, int HALVES>
void add_book(int32_t bits, const Strings& s, const X* x, U (&sum)[M][HALVES]) {
  add_chunks<Wide<WIDTH, BITS>, M, HALVES>({EightIndices<BITS>(bits), s.codes, s.book, s.next_code, s.apart}, x, s.chunks, sum);
}

// Of one token, whose call is bound by indices and loads: the bits are known.
template <int WIDTH, int HALVES>
auto alone(int32_t bits) {
  switch (bits) {
    case 8: return add_book<WIDTH, 8, 1, HALVES>;
    case 9: return add_book<WIDTH, 9, 1, HALVES>;
    case 10: return add_book<WIDTH, 10, 1, HALVES>;
    case 11: return add_book<WIDTH, 11, 1, HALVES>;
    case 12: return add_book<WIDTH, 12, 1, HALVES>;
    case 13: return add_book<WIDTH, 13, 1, HALVES>;
    case 14: return add_book<WIDTH, 14, 1, HALVES>;
    case 15: return add_book<WIDTH, 15, 1, HALVES>;
    default: return add_book<WIDTH, 16, 1, HALVES>;
  }
}

// Two codes of wide books x M tokens, over a segment. Of one token each book is a pass of its own, as sums of integers may
// be split.
template <int WIDTH, int M, int HALVES>
FEWBIT_INLINE void add_wide(const Int8VectorTask& task, const Strings& first, const X* x, U (&sum)[M][HALVES]) {
  Strings second = first;
  second.codes += task.bits * 4, second.book += WIDTH << task.bits;
  if constexpr (M == 1) {
    alone<WIDTH, HALVES>(task.bits)(task.bits, first, x, sum);
    if (task.books == 2) alone<WIDTH, HALVES>(task.residual_bits)(task.residual_bits, second, x, sum);
  } else if (task.books == 1) {
    add_book<WIDTH, 0, M, HALVES>(task.bits, first, x, sum);
  } else {
    using At = EightIndices<0>;
    using Book = Wide<WIDTH, 0>;
    const Book one{At(task.bits), first.codes, first.book, first.next_code, first.apart};
    const Book two{At(task.residual_bits), second.codes, second.book, second.next_code, second.apart};
    add_chunks<Both<Book>, M, HALVES>({one, two}, x, first.chunks, sum);
  }
}

// Calls `add(d, sum)` for every eight rows [d, d + 8), or the last four, with sums to add to, and settles them.
template <int M, class Add>
FEWBIT_INLINE void each_rows(const Int8VectorTask& task, const VectorSegment& segment, int64_t token, Totals<M>& totals, Add add) {
  for (int64_t d = 0; d < task.dim; d += 8) {
    if (d + 4 < task.dim) {
      U sum[M][2] = {};
      add(d, sum);
      settle<M, 2>(task, segment, token, d, sum, totals);
    } else {
      U sum[M][1] = {};
      add(d, sum);
      settle<M, 1>(task, segment, token, d, sum, totals);
    }
  }
}

template <int WIDTH, int M>
void wide_codes(const Int8VectorTask& task, int64_t code, int64_t token, int64_t tokens) {
  Totals<M> totals = {};
  begin<M>(task, token, totals);
  const int64_t bytes = (task.bits + task.residual_bits) * 4;
  const uint8_t* codes = wide_codes_of(task, code);
  const X* x = activations_of<X>(task, token);
  VectorSegment segment(task);
  for (int64_t s = 0; s < task.segments; s++) {
    each_rows<M>(task, segment, token, totals, [&](int64_t d, auto& sum) {
      add_wide<WIDTH, M>(task, {codes, segment.book + d, task.chunks * bytes, bytes, segment.chunks}, x, sum);
    });
    codes += segment.chunks * bytes, x += segment.chunks * M * 32;
    segment.next();
  }
  put_codes<M>(task, code, token, tokens, totals);
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
  alignas(32) uint8_t bytes[2][kQuads][64];

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

template <int WIDTH, int M>
void narrow_tile(const Int8VectorTask& task, Books& books, int64_t tile, int64_t token, int64_t tokens) {
  Totals<M> totals[8] = {};
  for (auto& of : totals) begin<M>(task, token, of);
  const uint8_t* codes = codes_of(task, tile);
  const X* x = activations_of<X>(task, token);
  Indices indices;
  VectorSegment segment(task);
  for (int64_t s = 0; s < task.segments; s++) {
    if (segment.enters) books.enter(task, segment.book);
    indices.enter(task, codes, segment.chunks);
    for (int64_t u = 0; u < 16 && tile * 16 + u < task.rows; u += 2)
      each_rows<M>(task, segment, token, totals[u / 2], [&](int64_t d, auto& sum) {
        const Narrow<WIDTH> one{indices.bytes[0][0] + u * 4, books.bytes[0] + d};
        const Narrow<WIDTH> two{indices.bytes[1][0] + u * 4, books.bytes[1] + d};
        if (task.books == 1) add_chunks(one, x, segment.chunks, sum);
        else add_chunks(Both<Narrow<WIDTH>>{one, two}, x, segment.chunks, sum);
      });
    codes += segment.chunks * chunk_bytes(task), x += segment.chunks * M * 32;
    segment.next();
  }
  for (int64_t u = 0; u < 16; u += 2) put_codes<M>(task, tile * 16 + u, token, tokens, totals[u / 2]);
}

template <int WIDTH, int M>
void tiles(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  Books books;
  for (int64_t tile = tile_begin; tile < tile_end; tile++)
    for (int64_t token = 0; token < tokens; token += M) {
      if (!task.wide) narrow_tile<WIDTH, M>(task, books, tile, token, tokens - token);
      for (int64_t code = tile * 16; task.wide && code < tile * 16 + 16 && code < task.rows; code += 2)
        wide_codes<WIDTH, M>(task, code, token, tokens - token);
    }
}

template <int WIDTH>
void strips(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.together) {
    case 1: return tiles<WIDTH, 1>(task, tile_begin, tile_end, tokens);
    case 2: return tiles<WIDTH, 2>(task, tile_begin, tile_end, tokens);
    default: return tiles<WIDTH, kMost>(task, tile_begin, tile_end, tokens);
  }
}

void run(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const auto of = task.width == 8 ? strips<8> : strips<16>;
  of(task, tile_begin, tile_end, tokens);
}

}  // namespace

const Int8VectorKernel int8_vector_linear_avx2 = {kMost, kMost, sizeof(X), round_for_vectors<X>, run};

}  // namespace fewbit
