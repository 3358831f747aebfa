// SPDX-License-Identifier: Apache-2.0
// Vectors of bytes x one token or two, several codes beside one another: each entry fills registers of its own, so that nothing is
// transposed. Entries of small books are kept as float32, which one instruction loads and multiplies: sums of a segment of at
// most 256 columns are integers below 2^24, exact in any order. Those of large ones are widened to int32 as they are loaded.
#pragma once

#include "avx2/simd.h"

#include "avx2/indices.h"
#include "core/inline.h"
#include "core/int8_vector.h"
#include "core/tile_indices.h"

namespace fewbit {
namespace {

constexpr int kSums = 8;  // registers that hold sums: codes times tokens times registers of an entry

// WIDTH floats of an entry: of a register, how many there are, and how far apart entries are, as a power of two.
template <int WIDTH>
struct FloatEntry {
  using Number = float;
  using Stored = float;
  using Lanes = F;
  static constexpr int kWidth = WIDTH, kLanes = 8, kParts = WIDTH / 8, kShift = WIDTH == 8 ? 5 : 6, kEntries = 256;

  static FEWBIT_INLINE Lanes each(const float* x) { return _mm256_broadcast_ss(x); }
  static FEWBIT_INLINE Lanes load(const float* p) { return _mm256_loadu_ps(p); }
  static FEWBIT_INLINE void store(float* p, Lanes a) { _mm256_storeu_ps(p, a); }
  static FEWBIT_INLINE Lanes grown(Lanes sum, Lanes x, const float* entry) { return _mm256_fmadd_ps(x, load(entry), sum); }
};

template <>
struct FloatEntry<4> {
  using Number = float;
  using Stored = float;
  using Lanes = __m128;
  static constexpr int kWidth = 4, kLanes = 4, kParts = 1, kShift = 4, kEntries = 256;

  static FEWBIT_INLINE Lanes each(const float* x) { return _mm_broadcast_ss(x); }
  static FEWBIT_INLINE Lanes load(const float* p) { return _mm_loadu_ps(p); }
  static FEWBIT_INLINE void store(float* p, Lanes a) { _mm_storeu_ps(p, a); }
  static FEWBIT_INLINE Lanes grown(Lanes sum, Lanes x, const float* entry) { return _mm_fmadd_ps(x, load(entry), sum); }
};

// WIDTH bytes of an entry. Activations are the lower halves of lanes: what is above meets zeros.
template <int WIDTH>
struct ByteEntry {
  using Number = int32_t;
  using Stored = uint8_t;
  using Lanes = U;
  static constexpr int kWidth = WIDTH, kLanes = 8, kParts = WIDTH / 8, kShift = WIDTH == 8 ? 3 : 4, kEntries = 4096;

  static FEWBIT_INLINE Lanes each(const void* x) { return _mm256_set1_epi32(word_at<int32_t>(x)); }
  static FEWBIT_INLINE Lanes load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const U*>(p)); }
  static FEWBIT_INLINE void store(int32_t* p, Lanes a) { _mm256_storeu_si256(reinterpret_cast<U*>(p), a); }
  static FEWBIT_INLINE Lanes grown(Lanes sum, Lanes x, const uint8_t* entry) {
    const U wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(entry)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(wide, x));
  }
};

template <class Entry, int M = 1>
constexpr int kBeside = kSums / Entry::kParts / M;  // codes

// Adds the products of entry `at` of `book`, register `part`, to `sum`.
template <class Entry>
FEWBIT_INLINE void grow(typename Entry::Lanes& sum, typename Entry::Lanes x, const void* book, uint64_t at, int part) {
  const void* entry = static_cast<const char*>(book) + at;
  sum = Entry::grown(sum, x, static_cast<const typename Entry::Stored*>(entry) + part * Entry::kLanes);
  asm("" : "+x"(sum));  // in turn: GCC would put off additions, and keep products in memory for that
}

// Where four codes of one of four columns stand in Offsets.
constexpr int place_of(int fours, int column) { return fours / 2 * 32 + column / 2 * 16 + fours % 2 * 8 + column % 2 * 4; }

// Where the entries of a tile's segment begin, in bytes: (books, groups of four columns, 64), by fours of codes of a column.
struct Offsets {
  alignas(32) uint16_t of[2][kSegment / 4][64];

  // `joint`: entries are those of both books, the one of indices i and j being i + 2^bits j.
  void enter(const Int8VectorTask& task, const uint8_t* codes, int64_t chunks, int shift, bool joint) {
    for (int64_t c = 0; c < chunks; c++) {
      read<false>(task.bits, codes, shift, of[0] + c * 8);
      codes += task.bits * 64;
      if (joint) read<true>(task.residual_bits, codes, shift + task.bits, of[0] + c * 8);
      else if (task.books == 2) read<false>(task.residual_bits, codes, shift, of[1] + c * 8);
      codes += task.residual_bits * 64;
    }
  }

 private:
  template <bool JOIN>
  static void read(int32_t bits, const uint8_t* codes, int shift, uint16_t (*out)[64]) {
    switch (bits) {
      case 4: return read<JOIN, 4>(codes, shift, out);
      case 5: return read<JOIN, 5>(codes, shift, out);
      case 6: return read<JOIN, 6>(codes, shift, out);
      case 7: return read<JOIN, 7>(codes, shift, out);
      default: return read<JOIN, 8>(codes, shift, out);
    }
  }

  // JOIN: beside what stands there.
  template <bool JOIN, int BITS>
  static FEWBIT_INLINE void read(const uint8_t* codes, int shift, uint16_t (*out)[64]) {
    const U none = _mm256_setzero_si256();
    const U turned = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    decode<BITS>(codes, [&](int at, int g, U bytes) {
      const U own = _mm256_shuffle_epi8(BITS == 6 ? mask(bytes, 0x3f3f3f3fu) : bytes, turned);
      put<JOIN>(out[g] + at, _mm256_slli_epi16(_mm256_unpacklo_epi8(own, none), shift));
      put<JOIN>(out[g] + at + 16, _mm256_slli_epi16(_mm256_unpackhi_epi8(own, none), shift));
    });
  }

  template <bool JOIN>
  static FEWBIT_INLINE void put(uint16_t* out, U words) {
    U* to = reinterpret_cast<U*>(out);
    _mm256_store_si256(to, JOIN ? combine(_mm256_load_si256(to), words) : words);
  }
};

// Adds the products of groups of four columns of some codes with M tokens, `next` activations apart, to `total`, (codes,
// tokens, numbers of an entry). A call of its own: what surrounds it would keep registers that its sums need.
template <class Entry, int M>
FEWBIT_APART void add_quads(const void* book, const uint16_t* at, const typename Entry::Number* x, int64_t next,
                            int64_t quads, typename Entry::Number* total) {
  constexpr int P = Entry::kParts;
  const uint64_t second = in_register(16 | 16 << 8), third = in_register(32 | 16 << 8);
  typename Entry::Lanes sum[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i++) sum[i] = Entry::load(total + i * Entry::kLanes);
  for (const auto* end = x + quads * 4; x < end; x += 4, at += 64)
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      typename Entry::Lanes each[M];
      for (int m = 0; m < M; m++) each[m] = Entry::each(x + m * next + k);
#pragma GCC unroll 2
      for (int u = 0; u < kBeside<Entry, M>; u += 4) {
        const uint64_t word = in_register(word_at<uint64_t>(at + place_of(u / 4, k)));
        const uint64_t from[4] = {static_cast<uint16_t>(word), extract(word, second), extract(word, third), word >> 48};
#pragma GCC unroll 8
        for (int i = 0; i < 4 * M * P; i++)
          grow<Entry>(sum[u * M * P + i], each[i / P % M], book, from[i / P / M], i % P);
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i++) Entry::store(total + i * Entry::kLanes, sum[i]);
}

// Likewise of chunks of some codes of a wide book, which lie `next` bytes apart, and whose chunks lie `apart`, with one token,
// whose chunks lie `x_apart` activations apart.
template <class Entry, int BITS>
FEWBIT_APART void add_wide_chunks(const EightIndices<BITS>& indices, const uint8_t* codes, int64_t next,
                                  int64_t apart, const uint8_t* book, const int16_t* x, int64_t x_apart,
                                  int64_t chunks, int32_t* total) {
  typename Entry::Lanes sum[kSums], each[4];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i++) sum[i] = Entry::load(total + i * Entry::kLanes);
  for (; chunks > 0; chunks--, codes += apart, x += x_apart) {
    for (int u = 0; u < kBeside<Entry>; u++) __builtin_prefetch(codes + (u + kBeside<Entry>) * next, 0, 2);  // what comes next
    const uint8_t* here = codes;
    for (int column = 0; column < 32; column += 8, here += indices.size())
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) each[i] = Entry::each(x + column + half * 4 + i);
#pragma GCC unroll 8
        for (int u = 0; u < kBeside<Entry>; u++) {
          uint64_t at[4];
          if (half) indices.last(here + u * next, at);
          else indices.first(here + u * next, at);
#pragma GCC unroll 8
          for (int i = 0; i < 4 * Entry::kParts; i++)
            grow<Entry>(sum[u * Entry::kParts + i % Entry::kParts], each[i / Entry::kParts], book,
                        at[i / Entry::kParts] << Entry::kShift, i % Entry::kParts);
        }
      }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i++) Entry::store(total + i * Entry::kLanes, sum[i]);
}

}  // namespace
}  // namespace fewbit
