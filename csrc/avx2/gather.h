// SPDX-License-Identifier: Apache-2.0
// Entries of two neighbouring columns of a code and of the next code, in a register: each is one load, from a book whose indices
// are a dense string, or bytes.
#pragma once

#include "avx2/simd.h"

#include "avx2/indices.h"
#include "core/inline.h"

namespace fewbit {
namespace {

// Eight rows of two columns, entry beside entry.
template <int WIDTH>
FEWBIT_INLINE __m128i pair(const uint8_t* book, uint64_t first, uint64_t second) {
  return beside(book + first * WIDTH, book + second * WIDTH);
}

// Where rows 4h .. 4h+3 of a pair lie, as words of both columns in turn.
FEWBIT_INLINE U order(int h) {
  const __m128i at = _mm_setr_epi8(0, -1, 8, -1, 1, -1, 9, -1, 2, -1, 10, -1, 3, -1, 11, -1);
  return _mm256_broadcastsi128_si256(_mm_add_epi8(at, _mm_set1_epi16(static_cast<int16_t>(4 * h))));
}

// Calls `work` with `bits` as a constant: few registers are left for where indices begin.
template <class Work>
FEWBIT_INLINE void with_bits(int32_t bits, Work work) {
  switch (bits) {
    case 8: return work(EightIndices<8>(8));
    case 9: return work(EightIndices<9>(9));
    case 10: return work(EightIndices<10>(10));
    case 11: return work(EightIndices<11>(11));
    case 12: return work(EightIndices<12>(12));
    case 13: return work(EightIndices<13>(13));
    case 14: return work(EightIndices<14>(14));
    case 15: return work(EightIndices<15>(15));
    default: return work(EightIndices<16>(16));
  }
}

// Two codes of a wide book.
template <int WIDTH, int BITS>
struct Wide {
  EightIndices<BITS> indices;
  const uint8_t *codes, *book;
  int64_t next_code, apart;  // bytes from a code to the next, from a chunk to the next

  FEWBIT_INLINE void enter() {
    fetch_early(codes);
    fetch_early(codes + next_code);
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
    uint64_t at[4];
    indices.first(from, at);
    out[0] = pair<WIDTH>(book, at[0], at[1]), out[1] = pair<WIDTH>(book, at[2], at[3]);
    indices.last(from, at);
    out[2] = pair<WIDTH>(book, at[0], at[1]), out[3] = pair<WIDTH>(book, at[2], at[3]);
  }
};

template <int WIDTH, int BITS>
FEWBIT_INLINE Wide<WIDTH, BITS> wide(const EightIndices<BITS>& at, const uint8_t* codes, const uint8_t* book, int64_t next_code,
                                     int64_t apart) {
  return {at, codes, book, next_code, apart};
}

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
template <int WIDTH>
struct Both {
  Narrow<WIDTH> first, second;

  FEWBIT_INLINE void enter() {}
  FEWBIT_INLINE void next() { first.next(), second.next(); }
  FEWBIT_INLINE void operator()(int g, U (&out)[4]) const {
    U rest[4];
    first(g, out), second(g, rest);
    for (int i = 0; i < 4; i++) out[i] = _mm256_add_epi8(out[i], rest[i]);
  }
};

}  // namespace
}  // namespace fewbit
