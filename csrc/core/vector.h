// SPDX-License-Identifier: Apache-2.0
// y = x W^T for codes that index vectors of a codebook, cut along the rows of W (VPTQ, Liu et al. 2024,
// arXiv:2409.17066): y[rows of a code] += x[column] * book[index]. Included after an ISA's simd.h, its `beside`,
// kAccumulators and kMost (tokens computed together where there are many), inside one translation unit per ISA; everything
// has internal linkage.
//
// The eight codes of a tile and a column stand for 8 x WIDTH floats, one after the other: 8 * WIDTH / kLanes vectors,
// whose accumulators stay in registers while columns are walked. A strip is as many of them as fit beside the tokens
// that are computed together. Per code and strip: a shift, a mask, one load (two entries are added first where there
// is a residual), then one multiply-add a token.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "core/dtypes.h"
#include "core/inline.h"
#include "core/kernel.h"
#include "core/word.h"

namespace fewbit {
namespace {

// Up to four of the eight indices that lie in `bits` bytes, from index `first` on, as offsets into a book: multiples of
// 2^SCALE bytes, so that a shift and a mask make an address. No byte beyond the eight indices is touched.
template <int SCALE>
struct Indices {
  bool narrow;  // below 8 bits all eight fit in a word, shifted left by SCALE at once; else the first is, by itself
  int bits, offset, shift, lead, next[4];
  uint64_t mask;

  FEWBIT_INLINE Indices(int width, int first)
      : narrow(width < 8), bits(width), offset(0), shift(first * width), lead(narrow ? 0 : SCALE),
        mask(((uint64_t{1} << width) - 1) << SCALE) {
    if (!narrow && first >= 4) offset = bits - 8, shift += 64 - 8 * bits;
    for (int i = 0; i < 4; i++) next[i] = i * bits - lead;
  }
  FEWBIT_INLINE uint64_t word(const uint8_t* p) const {
    if (!narrow) return word_at<uint64_t>(p + offset) >> shift;
    const uint64_t high = word_at<uint32_t>(p + bits - 4);
    return (word_at<uint32_t>(p) | high << (8 * bits - 32)) << SCALE >> shift;
  }
  FEWBIT_INLINE uint64_t at(uint64_t word, int i) const { return (i ? word >> next[i] : word << lead) & mask; }
};

FEWBIT_INLINE F load_entry(const float* p) { return load(p); }
FEWBIT_INLINE F load_entry(const uint16_t* p) { return load_half(p); }

// Vector t of those that entries of WIDTH numbers fill, one after the other.
template <int WIDTH, class E, int C>
FEWBIT_INLINE F entries(const E* const (&entry)[C], int t) {
  if constexpr (WIDTH >= kLanes) {
    constexpr int kParts = WIDTH / kLanes;
    return load_entry(entry[t / kParts] + t % kParts * kLanes);
  } else {
    constexpr int kBeside = kLanes / WIDTH;
    const E* some[kBeside];
    for (int i = 0; i < kBeside; i++) some[i] = entry[t * kBeside + i];
    return beside(some);
  }
}

// T vectors of a tile from vector `first`: what strips and decoding read column by column.
template <int WIDTH, class E, int T>
struct Book {
  static constexpr int kCodes = T * kLanes > WIDTH ? T * kLanes / WIDTH : 1, kWords = (kCodes + 3) / 4;
  static constexpr int kScale = (WIDTH == 4 ? 2 : WIDTH == 8 ? 3 : 4) + (sizeof(E) == 4 ? 2 : 1);
  Indices<kScale> indices[2];
  const E *all, *here = nullptr;

  FEWBIT_INLINE Book(const void* book, int bits, int first)
      : indices{{bits, first * kLanes / WIDTH}, {bits, 4}}, all(static_cast<const E*>(book) + first * kLanes % WIDTH) {}

  FEWBIT_INLINE void enter(int64_t block) {
    here = all + ((block * WIDTH) << indices[0].bits);
    asm("" : "+r"(here));  // one pointer: GCC would add the block to every index
  }

  FEWBIT_INLINE void find(const uint8_t* codes, const E* (&entry)[kCodes]) const {
    uint64_t word[kWords];
    for (int w = 0; w < kWords; w++) word[w] = indices[w].word(codes);
    for (int c = 0; c < kCodes; c++)
      entry[c] = reinterpret_cast<const E*>(reinterpret_cast<const char*>(here) + indices[0].at(word[c / 4], c % 4));
  }

  FEWBIT_INLINE void read(const uint8_t* codes, F (&value)[T]) const {
    const E* entry[kCodes];
    find(codes, entry);
    for (int t = 0; t < T; t++) value[t] = entries<WIDTH>(entry, t);
  }
};

// The columns of a tile, T vectors of each from vector `first`: what products and decoding read.
template <int WIDTH, class E, bool RESIDUAL, int T>
struct Walk {
  const int bits, bytes;
  const uint8_t* codes;
  Book<WIDTH, E, T> book, residual;
  int64_t column = 0, end = 0;
  const int64_t block;

  FEWBIT_INLINE Walk(const VectorTask& task, int64_t tile, int first)
      : bits(task.bits), bytes(task.bits + task.residual_bits), codes(task.codes + tile * task.columns * bytes),
        book(task.book, bits, first),
        residual(RESIDUAL ? task.residual : task.book, RESIDUAL ? task.residual_bits : bits, first),
        block(task.block) {}

  FEWBIT_INLINE void next(F (&value)[T]) {
    if (column == end) {
      book.enter(end / block);
      if (RESIDUAL) residual.enter(end / block);
      end += block;
    }
    book.read(codes, value);
    if (RESIDUAL) {
      F more[T];
      residual.read(codes + bits, more);
      for (int t = 0; t < T; t++) value[t] = add(value[t], more[t]);
    }
    codes += bytes, column++;
  }
};

// Writes T vectors of a tile x M tokens, of which the task has those from `token`.
template <int WIDTH, int T, int M>
FEWBIT_INLINE void put_strip(const VectorTask& task, int64_t tile, int first, int64_t token, const F (&acc)[T][M]) {
  float lanes[M][T * kLanes];  // all are stored, as a loop that may end early would keep the accumulators in memory
#pragma GCC unroll 16
  for (int i = 0; i < T * M; i++) store(lanes[i % M] + i / M * kLanes, acc[i / M][i % M]);
  for (int m = 0; m < M && token + m < task.tokens; m++) {
    for (int i = 0; i < T * kLanes; i++) {
      const int64_t lane = first * kLanes + i, row = (tile * 8 + lane / WIDTH) * task.dim + lane % WIDTH;
      if (lane % WIDTH >= task.dim || row >= task.rows) continue;
      write_float(task.y, task.y_dtype, (token + m) * task.y_stride + row,
                  task.bias ? lanes[m][i] + task.bias[row] : lanes[m][i]);
    }
  }
}

// T vectors of a tile x M tokens, of which those from `token` that the task has are written.
template <int WIDTH, class E, bool RESIDUAL, int T, int M>
void strip(const VectorTask& task, int64_t tile, int first, int64_t token) {
  F acc[T][M];
#pragma GCC unroll 16
  for (int i = 0; i < T * M; i++) acc[i / M][i % M] = broadcast(0.0f);
  const float* panel = task.panel + token * task.columns;
  Walk<WIDTH, E, RESIDUAL, T> walk(task, tile, first);
  for (int64_t column = 0; column < task.columns; column++, panel += M) {
    F value[T];
    walk.next(value);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const F x = broadcast(panel[m]);
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) acc[t][m] = fma(value[t], x, acc[t][m]);
    }
  }
  put_strip<WIDTH, T, M>(task, tile, first, token, acc);
}

template <int WIDTH, class E, bool RESIDUAL, int M>
void strips(const VectorTask& task, int64_t tile, int64_t token) {
  constexpr int kVectors = 8 * WIDTH / kLanes, kFit = kAccumulators / M, T = kFit < kVectors ? kFit : kVectors;
  for (int first = 0; first < kVectors; first += T) strip<WIDTH, E, RESIDUAL, T, M>(task, tile, first, token);
}

template <int WIDTH, class E, bool RESIDUAL>
struct Tile {
  using Entry = E;
  static constexpr int kWidth = WIDTH;
  static constexpr bool kResidual = RESIDUAL;

  static void run(const VectorTask& task, int64_t tile) {
    for (int64_t token = 0; token < task.tokens; token += task.together) {
      if (task.together == 1) strips<WIDTH, E, RESIDUAL, 1>(task, tile, token);
      else if (task.together == 2) strips<WIDTH, E, RESIDUAL, 2>(task, tile, token);
      else if (task.together == 4 || kMost == 4) strips<WIDTH, E, RESIDUAL, 4>(task, tile, token);
      else strips<WIDTH, E, RESIDUAL, 8>(task, tile, token);
    }
  }

  static void decode(const VectorTask& task, int64_t tile, float* out, int64_t stride) {
    constexpr int kVectors = 8 * WIDTH / kLanes, T = kVectors < 8 ? kVectors : 8;
    for (int first = 0; first < kVectors; first += T) {
      Walk<WIDTH, E, RESIDUAL, T> walk(task, tile, first);
      for (int64_t column = 0; column < task.columns; column++) {
        F value[T];
        float lanes[T * kLanes];
        walk.next(value);
        for (int t = 0; t < T; t++) store(lanes + t * kLanes, value[t]);
        for (int i = 0; i < T * kLanes; i++) {
          const int64_t lane = first * kLanes + i;
          if (lane % WIDTH < task.dim) out[column * stride + lane / WIDTH * task.dim + lane % WIDTH] = lanes[i];
        }
      }
    }
  }
};

// Calls the member of Tile that is made for the task's widths: TileCall(Tile<...>) with its arguments.
template <class Use>
void dispatch(const VectorTask& task, const Use& use) {
  const auto narrowed = [&](auto width) {
    constexpr int W = decltype(width)::value;
    if (task.half) return task.residual ? use(Tile<W, uint16_t, true>()) : use(Tile<W, uint16_t, false>());
    return task.residual ? use(Tile<W, float, true>()) : use(Tile<W, float, false>());
  };
  if (task.width == 4) return narrowed(std::integral_constant<int, 4>());
  return task.width == 8 ? narrowed(std::integral_constant<int, 8>()) : narrowed(std::integral_constant<int, 16>());
}

void vector_run(const VectorTask& task, int64_t tile) {
  dispatch(task, [&](auto made) { made.run(task, tile); });
}

void vector_decode(const VectorTask& task, int64_t tile, float* out, int64_t stride) {
  dispatch(task, [&](auto made) { made.decode(task, tile, out, stride); });
}

}  // namespace
}  // namespace fewbit
