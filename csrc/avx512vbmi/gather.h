// SPDX-License-Identifier: Apache-2.0
// Vectors of bytes from books that no registers hold: an entry is one load. Of eight neighbouring columns, entries of 8
// bytes fill a register, as (column, row); one vpermi2b transposes it, so that every lane has four columns of a row, and
// one vpdpbusd multiplies them, for each token, by activations that are repeated for all rows. Two loads a cycle bound a
// single token.
#pragma once

#include "avx2/indices.h"
#include "avx512vnni/dot.h"

#include "core/inline.h"
#include "core/int8_vector.h"

namespace fewbit {
namespace {

// Two entries, side by side.
template <int WIDTH>
FEWBIT_INLINE auto pair(const uint8_t* book, uint64_t first, uint64_t second) {
  const uint8_t *low = book + first * WIDTH, *high = book + second * WIDTH;
  const auto whole = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  if constexpr (WIDTH == 16) return _mm256_set_m128i(whole(high), whole(low));
  else return beside(low, high);
}

// The entries of eight columns: halves of registers that hold 64 / WIDTH of them.
template <int WIDTH>
struct Eight {
  __m256i half[WIDTH / 8][2];
};

// Reads the indices of eight columns, which are `bits` bytes, and their entries. BITS: known beforehand, or 0.
template <int WIDTH, int BITS>
struct Gather {
  EightIndices<BITS> indices;
  const uint8_t* book;

  FEWBIT_INLINE Gather(int64_t own, const uint8_t* entries) : indices(own), book(entries) {}

  FEWBIT_INLINE Eight<WIDTH> operator()(const uint8_t* codes) const {
    uint64_t at[4];
    indices.first(codes, at);
    const auto a = pair<WIDTH>(book, at[0], at[1]), b = pair<WIDTH>(book, at[2], at[3]);
    indices.last(codes, at);
    const auto c = pair<WIDTH>(book, at[0], at[1]), d = pair<WIDTH>(book, at[2], at[3]);
    if constexpr (WIDTH == 16) return {{{a, b}, {c, d}}};
    else return {{{_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)}}};
  }
};

// Where vpermi2b finds the bytes of 64 / WIDTH columns: lane (row, group of four columns), column.
template <int WIDTH>
struct Transposition {
  alignas(64) uint8_t at[64];

  constexpr Transposition() : at() {
    constexpr int kColumns = 64 / WIDTH, kGroups = kColumns / 4, kHalf = kColumns / 2;
    for (int i = 0; i < 64; i++) {
      const int row = i / 4 / kGroups, column = i / 4 % kGroups * 4 + i % 4;
      at[i] = static_cast<uint8_t>(column % kHalf * WIDTH + row + column / kHalf * 64);
    }
  }
};

// Activations of 64 / WIDTH columns, for every row.
template <int WIDTH>
FEWBIT_INLINE U repeated(const int8_t* x) {
  return WIDTH == 16 ? _mm512_set1_epi32(word_at<int32_t>(x)) : _mm512_set1_epi64(word_at<int64_t>(x));
}

// Lanes (row, group of columns), each row added up, as floats.
template <int WIDTH>
FEWBIT_INLINE F row_sums(U dot) {
  if (WIDTH == 16) return convert(dot);
  const U both = _mm512_add_epi32(dot, _mm512_shuffle_epi32(dot, _MM_PERM_CDAB));
  return convert(_mm512_maskz_compress_epi32(0x5555, both));
}

template <int WIDTH>
FEWBIT_INLINE U transposed(const __m256i (&half)[2], U order) {
  return _mm512_permutex2var_epi8(_mm512_castsi256_si512(half[0]), order, _mm512_castsi256_si512(half[1]));
}

// A segment of one book and one token: chunks of codes, `apart` bytes from one to the next. Such calls are bound by loads
// and the indices for them, whose bits are known here: for two books, sums of both are one sum.
template <int WIDTH, int BITS>
U add_alone(const uint8_t* codes, int64_t apart, const uint8_t* book, const int8_t* x, int64_t chunks, U order, U sum) {
  const Gather<WIDTH, BITS> gather(BITS, book);
  U dot[2] = {sum, _mm512_setzero_si512()};
  for (const int8_t* end = x + chunks * 32; x < end; x += 32, codes += apart) {
    fetch_early(codes);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      const Eight<WIDTH> bytes = gather(codes + g * BITS);
#pragma GCC unroll 2
      for (int v = 0; v < WIDTH / 8; v++)
        dot[(g + v) % 2] = multiply_add(dot[(g + v) % 2], transposed<WIDTH>(bytes.half[v], order),
                                        repeated<WIDTH>(x + g * 8 + v * 4));
    }
  }
  return _mm512_add_epi32(dot[0], dot[1]);
}

template <int WIDTH>
auto alone(int32_t bits) {
  switch (bits) {
    case 8: return add_alone<WIDTH, 8>;
    case 9: return add_alone<WIDTH, 9>;
    case 10: return add_alone<WIDTH, 10>;
    case 11: return add_alone<WIDTH, 11>;
    case 12: return add_alone<WIDTH, 12>;
    case 13: return add_alone<WIDTH, 13>;
    case 14: return add_alone<WIDTH, 14>;
    case 15: return add_alone<WIDTH, 15>;
    default: return add_alone<WIDTH, 16>;
  }
}

// A segment x M tokens, which are bound by products.
template <int WIDTH, int BOOKS, int M>
FEWBIT_INLINE void add_many(const Int8VectorTask& task, const uint8_t* codes, const VectorSegment& segment, const int8_t* x,
                            U order, U (&dot)[M]) {
  const Gather<WIDTH, 0> first(task.bits, segment.book);
  const Gather<WIDTH, 0> second(BOOKS == 2 ? task.residual_bits : 8, segment.book + (WIDTH << task.bits));
  for (const int8_t* end = x + segment.chunks * M * 32; x < end; x += M * 32) {
    const uint8_t* more = codes + first.indices.size() * 4;
    fetch_early(codes);
    if (BOOKS == 2) fetch_early(more);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      Eight<WIDTH> bytes = first(codes + g * first.indices.size());
      if constexpr (BOOKS == 2) {
        const Eight<WIDTH> rest = second(more + g * second.indices.size());
        for (int h = 0; h < WIDTH / 4; h++) {
          __m256i& sum = bytes.half[h / 2][h % 2];
          sum = _mm256_add_epi8(sum, rest.half[h / 2][h % 2]);
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < WIDTH / 8; v++) {
        const U all = transposed<WIDTH>(bytes.half[v], order);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) dot[m] = multiply_add(dot[m], all, repeated<WIDTH>(x + m * 32 + g * 8 + v * 4));
      }
    }
    codes = more + (BOOKS == 2 ? second.indices.size() * 4 : 0);
  }
}

// The rows of one code x M tokens, of which `tokens` exist.
template <int WIDTH, int BOOKS, int M>
void gather_code(const Int8VectorTask& task, int64_t code, int64_t token, int64_t tokens) {
  static constexpr Transposition<WIDTH> kOrder;
  const U order = load_lanes(kOrder.at);
  const auto rows = static_cast<__mmask16>((1u << task.dim) - 1);
  alignas(64) float totals[M][16];
  for (int m = 0; m < M; m++) store(totals[m], _mm512_maskz_loadu_ps(rows, task.start + (token + m) * task.dim));
  const int64_t bytes = (task.bits + task.residual_bits) * 4;  // of a chunk
  const uint8_t* codes = wide_codes_of(task, code);
  const int8_t* x = activations_of<int8_t>(task, token);
  VectorSegment segment(task);
  for (int64_t s = 0; s < task.segments; s++) {
    U dot[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) dot[m] = _mm512_setzero_si512();
    if constexpr (M == 1) {
      dot[0] = alone<WIDTH>(task.bits)(codes, bytes, segment.book, x, segment.chunks, order, dot[0]);
      if (BOOKS == 2)
        dot[0] = alone<WIDTH>(task.residual_bits)(codes + task.bits * 4, bytes, segment.book + (WIDTH << task.bits), x,
                                                  segment.chunks, order, dot[0]);
    } else {
      add_many<WIDTH, BOOKS, M>(task, codes, segment, x, order, dot);
    }
    const F step = _mm512_maskz_loadu_ps(rows, segment.step);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const F factor = multiply(step, broadcast(segment.x_scale[(token + m) * task.x_blocks]));
      store(totals[m], fused(factor, row_sums<WIDTH>(dot[m]), load(totals[m])));
    }
    codes += segment.chunks * bytes, x += segment.chunks * M * 32;
    segment.next();
  }
  for (int m = 0; m < M && m < tokens; m++) put_code(task, code, token + m, totals[m]);
}

template <int WIDTH, int BOOKS>
auto gather_of(int64_t together) {
  switch (together) {
    case 1: return gather_code<WIDTH, BOOKS, 1>;
    case 2: return gather_code<WIDTH, BOOKS, 2>;
    case 4: return gather_code<WIDTH, BOOKS, 4>;
    case 8: return gather_code<WIDTH, BOOKS, 8>;
    default: return gather_code<WIDTH, BOOKS, kMostTogether>;
  }
}

void gather_tiles(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t m = task.together;
  const bool two = task.books == 2;
  const auto of = task.width == 8 ? two ? gather_of<8, 2>(m) : gather_of<8, 1>(m)
                  : two           ? gather_of<16, 2>(m)
                                  : gather_of<16, 1>(m);
  for (int64_t code = tile_begin * 16; code < tile_end * 16 && code < task.rows; code++)
    for (int64_t token = 0; token < tokens; token += task.together) of(task, code, token, tokens - token);
}

}  // namespace
}  // namespace fewbit
