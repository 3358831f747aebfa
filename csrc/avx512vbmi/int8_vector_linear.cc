// SPDX-License-Identifier: Apache-2.0
// Vectors of bytes, looked up 64 codes at a time: a register holds one row's byte of up to 64 entries (vpermb); of 256,
// four do (vpermi2b twice). Bytes of a residual are added before they are multiplied. Indices of 6 bits are looked up as
// they are stored, since vpermb heeds no more than 6 bits of a byte; others are decoded a chunk ahead, by way of memory:
// looked up as they are decoded, every one of them would be waited for.
#include "avx512vnni/dot.h"

#include "avx512vbmi/gather.h"
#include "core/int8_vector.h"
#include "core/tile_indices.h"

namespace fewbit {
namespace {

// The indices of two chunks of a tile: of the one that is looked up, and of the next. (chunk % 2, book, groups of four
// columns, 16 codes of these)
template <int BOOKS>
struct alignas(64) Indices {
  uint8_t bytes[2][BOOKS][8][64];
  const uint8_t* codes;
  int32_t bits[2];

  FEWBIT_INLINE Indices(const Int8VectorTask& task, int64_t tile)
      : codes(codes_of(task, tile)), bits{task.bits, task.residual_bits} {}

  FEWBIT_INLINE void write(int64_t chunk) {
    for (int b = 0; b < BOOKS; b++) {
      decode(bits[b], codes, bytes[chunk % 2][b]);
      codes += bits[b] * 64;
    }
  }
  FEWBIT_INLINE void enter(int64_t chunk, int64_t chunks) {
    if (chunk == 0) write(0);
    if (chunk + 1 < chunks) write(chunk + 1);
    now = bytes[chunk % 2];
  }
  FEWBIT_INLINE U operator()(int b, int g) const { return load_lanes(now[b][g]); }

 private:
  const uint8_t (*now)[8][64];
};

// The indices of a chunk of a tile where all have 6 bits.
template <int BOOKS>
struct SixBits {
  const uint8_t *next, *now;

  FEWBIT_INLINE SixBits(const Int8VectorTask& task, int64_t tile) : next(codes_of(task, tile)), now(next) {}

  FEWBIT_INLINE void enter(int64_t, int64_t) {
    now = next, next += BOOKS * 6 * 64;
    prefetch<BOOKS * 6>(now + kAhead);
  }
  FEWBIT_INLINE U operator()(int b, int g) const { return six_bits(now + b * 6 * 64, g); }
};

// One row's byte of each entry.
template <int ENTRIES>
struct Entries {
  U part[ENTRIES / 64];

  FEWBIT_INLINE void load(const uint8_t* bytes) {
    for (int i = 0; i < ENTRIES / 64; i++) part[i] = load_lanes(bytes + i * 64);
  }
  FEWBIT_INLINE U operator()(U at) const {
    if constexpr (ENTRIES == 64) {
      return _mm512_permutexvar_epi8(at, part[0]);
    } else {
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), _mm512_permutex2var_epi8(part[0], at, part[1]),
                                    _mm512_permutex2var_epi8(part[2], at, part[3]));
    }
  }
};

// A chunk's products: rows T of a tile's codes x M tokens.
template <int ENTRIES, int BOOKS, int M, int T, class Source>
FEWBIT_INLINE void add_chunk(const Entries<ENTRIES> (&entries)[BOOKS][T], const Source& indices, const int8_t* x,
                             U (&dot)[M][T]) {
#pragma GCC unroll 8
  for (int g = 0; g < 8; g++) {
    U at[BOOKS], four[M];
    for (int b = 0; b < BOOKS; b++) at[b] = indices(b, g);
    for (int m = 0; m < M; m++) {
      int32_t lane;
      memcpy(&lane, x + m * 32 + g * 4, sizeof lane);
      four[m] = _mm512_set1_epi32(lane);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      U bytes = entries[0][t](at[0]);
      if constexpr (BOOKS == 2) bytes = _mm512_add_epi8(bytes, entries[1][t](at[1]));
      for (int m = 0; m < M; m++) dot[m][t] = multiply_add(dot[m][t], bytes, four[m]);
    }
  }
}

// Rows [d, d + T) of a tile's codes x M tokens, of which `tokens` exist.
template <int ENTRIES, int BOOKS, template <int> class Source, int M, int T>
void strip(const Int8VectorTask& task, int64_t tile, int64_t token, int64_t tokens, int64_t d) {
  Entries<ENTRIES> entries[BOOKS][T];
  alignas(64) float totals[M][T][16];
  for (int m = 0; m < M; m++)
    for (int t = 0; t < T; t++) store(totals[m][t], broadcast(task.start[(token + m) * task.dim + d + t]));
  const int8_t* x = activations_of<int8_t>(task, token);
  Source<BOOKS> indices(task, tile);
  VectorSegment segment(task);
  for (int64_t s = 0, chunk = 0; s < task.segments; s++, segment.next()) {
    if (segment.enters)
      for (int b = 0; b < BOOKS; b++)
        for (int t = 0; t < T; t++) entries[b][t].load(segment.book + (b * task.dim + d + t) * ENTRIES);
    U dot[M][T];
#pragma GCC unroll 16
    for (int i = 0; i < M * T; i++) dot[i / T][i % T] = _mm512_setzero_si512();
    for (const int64_t end = chunk + segment.chunks; chunk < end; chunk++, x += M * 32) {
      indices.enter(chunk, task.chunks);
      add_chunk<ENTRIES, BOOKS, M, T>(entries, indices, x, dot);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        const F factor = broadcast(segment.factor(token + m, d + t));
        store(totals[m][t], fused(factor, convert(dot[m][t]), load(totals[m][t])));
      }
  }
  for (int m = 0; m < M && m < tokens; m++) put<T>(task, tile, token + m, d, totals[m]);
}

// All rows of a tile's codes, as many at a time as share the registers with M tokens.
template <int ENTRIES, int BOOKS, template <int> class Source, int M>
void strips(const Int8VectorTask& task, int64_t tile, int64_t token, int64_t tokens) {
  constexpr int kMost = (ENTRIES == 64 ? 8 : 4 / BOOKS) / (M == 4 ? 2 : 1);
  int64_t d = 0;
  if constexpr (kMost >= 8)
    for (; d + 8 <= task.dim; d += 8) strip<ENTRIES, BOOKS, Source, M, 8>(task, tile, token, tokens, d);
  if constexpr (kMost >= 4)
    for (; d + 4 <= task.dim; d += 4) strip<ENTRIES, BOOKS, Source, M, 4>(task, tile, token, tokens, d);
  if constexpr (kMost >= 2)
    for (; d < task.dim; d += 2) strip<ENTRIES, BOOKS, Source, M, 2>(task, tile, token, tokens, d);
  for (; d < task.dim; d++) strip<ENTRIES, BOOKS, Source, M, 1>(task, tile, token, tokens, d);
}

template <int ENTRIES, int BOOKS, template <int> class Source = Indices>
void tiles(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  for (int64_t tile = tile_begin; tile < tile_end; tile++)
    for (int64_t token = 0; token < tokens; token += task.together) switch (task.together) {
        case 1: strips<ENTRIES, BOOKS, Source, 1>(task, tile, token, tokens - token); break;
        case 2: strips<ENTRIES, BOOKS, Source, 2>(task, tile, token, tokens - token); break;
        default: strips<ENTRIES, BOOKS, Source, 4>(task, tile, token, tokens - token);
      }
}

void run(const Int8VectorTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  if (task.wide) return gather_tiles(task, tile_begin, tile_end, tokens);
  const bool two = task.books == 2, six = task.bits == 6 && (!two || task.residual_bits == 6);
  const auto of = six                 ? two ? tiles<64, 2, SixBits> : tiles<64, 1, SixBits>
                  : task.entries == 64 ? two ? tiles<64, 2> : tiles<64, 1>
                                       : two ? tiles<256, 2> : tiles<256, 1>;
  of(task, tile_begin, tile_end, tokens);
}

}  // namespace

const Int8VectorKernel int8_vector_linear_avx512vbmi = {4, kMostTogether, sizeof(int8_t), round_for_vectors<int8_t>, run};

}  // namespace fewbit
