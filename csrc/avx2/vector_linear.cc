// SPDX-License-Identifier: Apache-2.0
#include "avx2/simd.h"

namespace fewbit {
namespace {

constexpr int kAccumulators = 8;  // of 16 registers: entries and activations take some too
constexpr int64_t kMost = 8;

// Two entries of 4 numbers.
inline F beside(const float* const (&entry)[2]) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(entry[0])), _mm_loadu_ps(entry[1]), 1);
}
inline F beside(const uint16_t* const (&entry)[2]) {
  const __m128i low = _mm_loadu_si64(entry[0]), high = _mm_loadu_si64(entry[1]);
  return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
}

}  // namespace
}  // namespace fewbit

#include "core/vector.h"

namespace fewbit {
namespace {

// As strip, of one token, in fewer instructions, which bound it. NARROW: indices have less than 8 bits.
template <int WIDTH, class E, bool RESIDUAL, bool NARROW, int T>
void strip_alone(const VectorTask& task, int64_t tile, int first) {
  using Entries = Book<WIDTH, E, T>;
  Entries book(task.book, task.bits, first);
  Entries residual(RESIDUAL ? task.residual : task.book, RESIDUAL ? task.residual_bits : task.bits, first);
  if (book.indices[0].narrow != NARROW || book.indices[1].narrow != NARROW) __builtin_unreachable();
  if (residual.indices[0].narrow != NARROW || residual.indices[1].narrow != NARROW) __builtin_unreachable();
  const int64_t bits = task.bits, bytes = bits + task.residual_bits;
  const uint8_t* codes = task.codes + tile * task.columns * bytes;
  F acc[T][1];
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) acc[t][0] = broadcast(0.0f);
  for (int64_t column = 0, block = 0; column < task.columns; block++) {
    book.enter(block);
    if (RESIDUAL) residual.enter(block);
    const int64_t end = column + task.block < task.columns ? column + task.block : task.columns;
    for (; column < end; column++, codes += bytes) {
      const F x = broadcast(task.panel[column]);
      const E *entry[Entries::kCodes], *more[Entries::kCodes];
      book.find(codes, entry);
      if (RESIDUAL) residual.find(codes + bits, more);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        const F value = entries<WIDTH>(entry, t);
        acc[t][0] = fma(RESIDUAL ? add(value, entries<WIDTH>(more, t)) : value, x, acc[t][0]);
        asm("" : "+x"(acc[t][0]));  // in turn: entries of all codes would take more registers than there are
      }
    }
  }
  put_strip<WIDTH, T, 1>(task, tile, first, 0, acc);
}

template <int WIDTH, class E, bool RESIDUAL, bool NARROW>
void tile_alone(const VectorTask& task, int64_t tile) {
  constexpr int T = WIDTH < kAccumulators ? WIDTH : kAccumulators;
  for (int first = 0; first < WIDTH; first += T) strip_alone<WIDTH, E, RESIDUAL, NARROW, T>(task, tile, first);
}

template <int WIDTH, class E, bool RESIDUAL>
struct Alone {
  static void run(const VectorTask& task, int64_t tile) {
    if (task.bits < 8) tile_alone<WIDTH, E, RESIDUAL, true>(task, tile);
    else tile_alone<WIDTH, E, RESIDUAL, false>(task, tile);
  }
};

void run(const VectorTask& task, int64_t tile) {
  const bool mixed = task.residual && (task.bits < 8) != (task.residual_bits < 8);
  if (task.tokens != 1 || task.together != 1 || mixed) return vector_run(task, tile);
  dispatch(task, [&](auto made) { Alone<made.kWidth, typename decltype(made)::Entry, made.kResidual>::run(task, tile); });
}

}  // namespace

const VectorKernel vector_linear_avx2 = {kMost, run, vector_decode};

}  // namespace fewbit
