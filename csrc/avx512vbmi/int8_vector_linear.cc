// SPDX-License-Identifier: Apache-2.0
// Vectors of bytes, looked up 64 codes at a time: a register holds one row's byte of up to 64 entries (vpermb); of 256,
// four do (vpermi2b twice). Bytes of a residual are added before they are multiplied. The indices of a segment are
// written out first, as bytes: looked up as they are decoded, every vector of them would be waited for.
#include "avx512vnni/dot.h"

#include "core/int8_vector.h"
#include "core/segments.h"

namespace fewbit {
namespace {

constexpr int kQuads = kSegment / 4;
constexpr int64_t kAhead = 12 * 1024;  // bytes: two chunks of a page are read in no order that a processor foresees

// Indices of a segment: a vector for four columns of 16 codes.
struct alignas(64) Indices {
  uint8_t bytes[kQuads][64];
};

// The index in the low bits of every byte; above 6 bits there may be anything.
template <int BITS>
FEWBIT_INLINE U index(const Held<BITS>& held, int g) {
  if constexpr (BITS != 6) {
    return held.quad(g);
  } else {
    const U low = g % 2 ? shift_right(held.part[0], 4) : held.part[0];
    const int at = g % 4 * 2;
    return select(0x0f0f0f0fu, low, at < 4 ? shift_left(held.part[1], 4 - at) : shift_right(held.part[1], at - 4));
  }
}

template <int BITS>
void decode(const uint8_t* codes, int64_t stride, int64_t chunks, Indices& out) {
  Held<BITS> held;
  for (int64_t c = 0; c < chunks; c++, codes += stride) {
    prefetch<BITS>(codes + kAhead);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
      held.advance(codes, g);
      store_lanes(out.bytes[c * 8 + g], index(held, g));
    }
  }
}

void decode(int32_t bits, const uint8_t* codes, int64_t stride, int64_t chunks, Indices& out) {
  switch (bits) {
    case 4: return decode<4>(codes, stride, chunks, out);
    case 5: return decode<5>(codes, stride, chunks, out);
    case 6: return decode<6>(codes, stride, chunks, out);
    case 7: return decode<7>(codes, stride, chunks, out);
    default: return decode<8>(codes, stride, chunks, out);
  }
}

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

// Rows [d, d + T) of a tile's codes x M tokens.
template <int ENTRIES, int BOOKS, int M, int T>
void add_rows(const Int8VectorTask& task, int64_t s, int64_t token, int64_t d, const Indices (&indices)[2],
              VectorTotals* totals) {
  Entries<ENTRIES> entries[BOOKS][T];
  const uint8_t* book = task.book + (s / task.block_segments * BOOKS * task.dim + d) * ENTRIES;
  for (int b = 0; b < BOOKS; b++)
    for (int t = 0; t < T; t++) entries[b][t].load(book + (b * task.dim + t) * ENTRIES);
  U dot[M][T];
#pragma GCC unroll 16
  for (int i = 0; i < M * T; i++) dot[i / T][i % T] = _mm512_setzero_si512();
  const int8_t* x = activations_of(task, token, s * task.segment_chunks);
  const int64_t chunks = chunks_of(task, s);
  for (int64_t c = 0; c < chunks; c++, x += M * 32) {
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
      U at[BOOKS], four[M];
      for (int b = 0; b < BOOKS; b++) at[b] = load_lanes(indices[b].bytes[c * 8 + g]);
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
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      float* total = totals[token + m][d + t];
      store(total, fused(broadcast(factor(task, s, token + m, d + t)), convert(dot[m][t]), load(total)));
    }
}

// All rows, as many at a time as share the registers with M tokens.
template <int ENTRIES, int BOOKS, int M>
void add_tokens(const Int8VectorTask& task, int64_t s, int64_t tokens, const Indices (&indices)[2],
                VectorTotals* totals) {
  constexpr int kMost = (ENTRIES == 64 ? 8 : 4 / BOOKS) / (M == 4 ? 2 : 1);
  for (int64_t token = 0; token < tokens; token += M) {
    int64_t d = 0;
    if constexpr (kMost >= 8)
      for (; d + 8 <= task.dim; d += 8) add_rows<ENTRIES, BOOKS, M, 8>(task, s, token, d, indices, totals);
    if constexpr (kMost >= 4)
      for (; d + 4 <= task.dim; d += 4) add_rows<ENTRIES, BOOKS, M, 4>(task, s, token, d, indices, totals);
    if constexpr (kMost >= 2)
      for (; d + 2 <= task.dim; d += 2) add_rows<ENTRIES, BOOKS, M, 2>(task, s, token, d, indices, totals);
    for (; d < task.dim; d++) add_rows<ENTRIES, BOOKS, M, 1>(task, s, token, d, indices, totals);
  }
}

template <int ENTRIES, int BOOKS>
void add_all(const Int8VectorTask& task, int64_t s, int64_t tokens, const Indices (&indices)[2], VectorTotals* totals) {
  switch (task.together) {
    case 1: return add_tokens<ENTRIES, BOOKS, 1>(task, s, tokens, indices, totals);
    case 2: return add_tokens<ENTRIES, BOOKS, 2>(task, s, tokens, indices, totals);
    default: return add_tokens<ENTRIES, BOOKS, 4>(task, s, tokens, indices, totals);
  }
}

void add_segment(const Int8VectorTask& task, int64_t tile, int64_t s, int64_t tokens, VectorTotals* totals) {
  Indices indices[2];
  const uint8_t* codes = codes_of(task, tile, s * task.segment_chunks);
  const int64_t stride = (task.bits + task.residual_bits) * 64, chunks = chunks_of(task, s);
  decode(task.bits, codes, stride, chunks, indices[0]);
  if (task.books == 2) decode(task.residual_bits, codes + task.bits * 64, stride, chunks, indices[1]);
  if (task.entries == 64)
    return task.books == 2 ? add_all<64, 2>(task, s, tokens, indices, totals)
                           : add_all<64, 1>(task, s, tokens, indices, totals);
  return task.books == 2 ? add_all<256, 2>(task, s, tokens, indices, totals)
                         : add_all<256, 1>(task, s, tokens, indices, totals);
}

}  // namespace

const Int8VectorKernel int8_vector_linear_avx512vbmi = {round_for_vectors, int8_vector_run};

}  // namespace fewbit
