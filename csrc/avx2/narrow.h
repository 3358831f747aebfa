// SPDX-License-Identifier: Apache-2.0
// Sums of many tokens: see core/spans.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "avx2/simd.h"

#include "core/rounding.h"

namespace fewbit {
namespace {

// Four planes times the activations of two tokens, added to eight sums. Not by intrinsics, whose order GCC changes until sums
// are copied, or wait in memory.
#define FEWBIT_STEP(BROADCAST, MULTIPLY, ADD, FOUR)                                                                        \
  U a, b, u, p, q;                                                                                                         \
  asm(BROADCAST " %[x], %[a]\n\t" BROADCAST " %[y], %[b]\n\t"                                                              \
      FEWBIT_ROW(MULTIPLY, ADD, "c0", "s0", "t0") FEWBIT_ROW(MULTIPLY, ADD, "c1", "s1", "t1")                              \
      FEWBIT_ROW(MULTIPLY, ADD, "c2", "s2", "t2") FEWBIT_ROW(MULTIPLY, ADD, "c3", "s3", "t3")                              \
      : [a] "=&x"(a), [b] "=&x"(b), [u] "=&x"(u), [p] "=&x"(p), [q] "=&x"(q), [s0] "+x"(narrow[0][0]),                     \
        [t0] "+x"(narrow[0][1]), [s1] "+x"(narrow[1][0]), [t1] "+x"(narrow[1][1]), [s2] "+x"(narrow[2][0]),                \
        [t2] "+x"(narrow[2][1]), [s3] "+x"(narrow[3][0]), [t3] "+x"(narrow[3][1])                                          \
      : [x] "m"(*reinterpret_cast<const FOUR*>(x)), [y] "m"(*reinterpret_cast<const FOUR*>(next)),                         \
        [c0] "m"(*reinterpret_cast<const U*>(codes)), [c1] "m"(*reinterpret_cast<const U*>(codes + 32)),                   \
        [c2] "m"(*reinterpret_cast<const U*>(codes + 64)), [c3] "m"(*reinterpret_cast<const U*>(codes + 96)))
#define FEWBIT_ROW(MULTIPLY, ADD, C, S, T)                                                                                 \
  "vmovdqa %[" C "], %[u]\n\t" MULTIPLY " %[a], %[u], %[p]\n\t" MULTIPLY " %[b], %[u], %[q]\n\t" ADD " %[p], %[" S         \
  "], %[" S "]\n\t" ADD " %[q], %[" T "], %[" T "]\n\t"

// Two vectors of codes times the activations of a token at X.
#define FEWBIT_TOKEN(X, S, T)                                                                                              \
  "vpbroadcastd %[" X "], %[a]\n\tvpmaddubsw %[a], %[u], %[p]\n\tvpmaddubsw %[a], %[v], %[a]\n\t"                         \
  "vpaddw %[p], %[" S "], %[" S "]\n\tvpaddw %[a], %[" T "], %[" T "]\n\t"

// The same of pairs that are added up in 32 bits at once.
#define FEWBIT_PAIR_ROW(C, S, T)                                                                                           \
  "vmovdqa %[" C "], %[u]\n\tvpmaddubsw %[a], %[u], %[p]\n\tvpmaddubsw %[b], %[u], %[q]\n\t" FEWBIT_PAIRS("q", S, T)
#define FEWBIT_PAIR_TOKEN(X, S, T)                                                                                         \
  "vpbroadcastd %[" X "], %[a]\n\tvpmaddubsw %[a], %[u], %[p]\n\tvpmaddubsw %[a], %[v], %[a]\n\t" FEWBIT_PAIRS("a", S, T)
#define FEWBIT_PAIRS(Q, S, T)                                                                                              \
  "vpmaddwd %[one], %[p], %[p]\n\tvpmaddwd %[one], %[" Q "], %[" Q "]\n\t"                                               \
  "vpaddd %[p], %[" S "], %[" S "]\n\tvpaddd %[" Q "], %[" T "], %[" T "]\n\t"

// Codes u times activations x. A narrow sum is exact modulo 2^16, and begins at -kCentre times the sum of its activations: it
// ends at that of (u - kCentre) * x, which fits an int16, as -2^(BITS-1) < u - kCentre <= 2^(BITS-1) and -128 <= x < 128. So
// does each pair of products, up to 6 bits; of 8 bits there are two planes.
constexpr int span_of(int bits) { return 256 >> bits > 64 ? 64 : 256 >> bits; }
constexpr int centre_of(int bits) { return (1 << (bits - 1)) - 1; }
constexpr int starts_of(int bits) { return bits > 6 ? 0 : span_of(bits) < 8 ? 8 / span_of(bits) : 1; }
constexpr int kMostStarts = starts_of(6);

// Spans are twice as long (TIMES) beside rows of which the magnitudes have room in that: see begin_doubled.
template <int BITS, int TIMES = 1>
struct NarrowSum {
  using X = int8_t;
  static constexpr int kSpan = span_of(BITS) * TIMES, kCentre = centre_of(BITS), kStarts = TIMES == 2 ? 1 : starts_of(BITS);
  static_assert(kSpan <= 64 && (TIMES == 1 || kSpan >= 8), "a start for each chunk of a row");

  static inline void hold(U& u) { asm("" : "+x"(u)); }
  static inline U start(const int32_t* at) { return _mm256_set1_epi32(*at); }
  static inline void step(U (&narrow)[4][2], const uint8_t* codes, const X* x, const X* next) {
    typedef int32_t Four __attribute__((may_alias));
    FEWBIT_STEP("vpbroadcastd", "vpmaddubsw", "vpaddw", Four);
  }
  static inline void step(U (&narrow)[2][4], U first, U second, const X* x) {
    typedef int32_t Four __attribute__((may_alias));
    const auto at = [&](int h) -> const Four& { return *reinterpret_cast<const Four*>(x + h * 32); };
    U a, p;
    asm(FEWBIT_TOKEN("x0", "s0", "t0") FEWBIT_TOKEN("x1", "s1", "t1")
        FEWBIT_TOKEN("x2", "s2", "t2") FEWBIT_TOKEN("x3", "s3", "t3")
        : [a] "=&x"(a), [p] "=&x"(p), [s0] "+x"(narrow[0][0]), [t0] "+x"(narrow[1][0]), [s1] "+x"(narrow[0][1]),
          [t1] "+x"(narrow[1][1]), [s2] "+x"(narrow[0][2]), [t2] "+x"(narrow[1][2]), [s3] "+x"(narrow[0][3]),
          [t3] "+x"(narrow[1][3])
        : [u] "x"(first), [v] "x"(second), [x0] "m"(at(0)), [x1] "m"(at(1)), [x2] "m"(at(2)), [x3] "m"(at(3)));
  }
  static inline U widened(U narrow) { return _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)); }
  static inline U widened(U low, U high) { return add(widened(low), _mm256_madd_epi16(high, _mm256_set1_epi16(16))); }
  static inline U add(U wide, U other) { return _mm256_add_epi32(wide, other); }
  static inline U integer(F value) { return _mm256_cvtps_epi32(value); }
};

// Codes whose pairs of products fit an int16 and two such pairs may not: up to 7 bits, any activations.
struct PairSum {
  using X = int8_t;
  static constexpr int kSpan = 64, kCentre = 0, kStarts = 0;
  typedef int32_t Four __attribute__((may_alias));

  static inline U start(const int32_t*) { return _mm256_setzero_si256(); }
  static inline const Four& at(const void* x) { return *static_cast<const Four*>(x); }
  static inline void step(U (&sum)[4][2], const uint8_t* codes, const X* x, const X* next) {
    U a, b, u, p, q;
    asm("vpbroadcastd %[x], %[a]\n\tvpbroadcastd %[y], %[b]\n\t"  //
        FEWBIT_PAIR_ROW("c0", "s0", "t0") FEWBIT_PAIR_ROW("c1", "s1", "t1")
        FEWBIT_PAIR_ROW("c2", "s2", "t2") FEWBIT_PAIR_ROW("c3", "s3", "t3")
        : [a] "=&x"(a), [b] "=&x"(b), [u] "=&x"(u), [p] "=&x"(p), [q] "=&x"(q), [s0] "+x"(sum[0][0]), [t0] "+x"(sum[0][1]),
          [s1] "+x"(sum[1][0]), [t1] "+x"(sum[1][1]), [s2] "+x"(sum[2][0]), [t2] "+x"(sum[2][1]), [s3] "+x"(sum[3][0]),
          [t3] "+x"(sum[3][1])
        : [x] "m"(at(x)), [y] "m"(at(next)), [one] "x"(_mm256_set1_epi16(1)), [c0] "m"(*reinterpret_cast<const U*>(codes)),
          [c1] "m"(*reinterpret_cast<const U*>(codes + 32)), [c2] "m"(*reinterpret_cast<const U*>(codes + 64)),
          [c3] "m"(*reinterpret_cast<const U*>(codes + 96)));
  }
  static inline void step(U (&sum)[2][4], U first, U second, const X* x) {
    U a, p;
    asm(FEWBIT_PAIR_TOKEN("x0", "s0", "t0") FEWBIT_PAIR_TOKEN("x1", "s1", "t1") FEWBIT_PAIR_TOKEN("x2", "s2", "t2")
            FEWBIT_PAIR_TOKEN("x3", "s3", "t3")
        : [a] "=&x"(a), [p] "=&x"(p), [s0] "+x"(sum[0][0]), [t0] "+x"(sum[1][0]), [s1] "+x"(sum[0][1]), [t1] "+x"(sum[1][1]),
          [s2] "+x"(sum[0][2]), [t2] "+x"(sum[1][2]), [s3] "+x"(sum[0][3]), [t3] "+x"(sum[1][3])
        : [u] "x"(first), [v] "x"(second), [one] "x"(_mm256_set1_epi16(1)), [x0] "m"(at(x)), [x1] "m"(at(x + 32)),
          [x2] "m"(at(x + 64)), [x3] "m"(at(x + 96)));
  }
  static inline U widened(U sum) { return sum; }
  static inline U add(U wide, U other) { return _mm256_add_epi32(wide, other); }
  static inline U integer(F value) { return _mm256_cvtps_epi32(value); }
};

template <>
struct NarrowSum<7> : PairSum {};

// Levels of 16 bits: each plane holds four columns of every other two rows, whose halves are added up at the end.
struct NarrowWords {
  using X = int16_t;
  static constexpr int kSpan = 64, kCentre = 0, kStarts = 0;

  static inline void step(U (&narrow)[4][2], const uint8_t* codes, const X* x, const X* next) {
    typedef int64_t Four __attribute__((may_alias));
    FEWBIT_STEP("vpbroadcastq", "vpmaddwd", "vpaddd", Four);
  }
  static inline U start(const int32_t*) { return _mm256_setzero_si256(); }
  static inline U widened(U low, U high) { return _mm256_hadd_epi32(low, high); }
  static inline U add(U wide, U other) { return _mm256_add_epi32(wide, other); }
};

// Calls put(chunk, sum, magnitudes) for each span of `span` chunks of a row. Of each group of four columns, or several in turn
// where a chunk has `words` spans, 16 bits have the sum of columns 0 and 1 of all the span's groups, and 16 that of 2 and 3.
template <class Put>
FEWBIT_INLINE void each_span(const SegmentTask& task, int64_t row, int64_t span, int64_t words, const Put& put) {
  const int8_t* x = row_of<int8_t>(task, row);
  const U one = _mm256_set1_epi8(1);
  const auto together = [=](U sum) {
    sum = _mm256_add_epi16(sum, _mm256_srli_epi64(sum, 32));
    if (words < 4) sum = _mm256_add_epi16(sum, _mm256_unpackhi_epi64(sum, sum));
    return words < 2 ? _mm256_add_epi16(sum, _mm256_permute4x64_epi64(sum, 0xaa)) : sum;
  };
  for (int64_t begin = 0, end; begin < task.chunks; begin = end) {
    const int64_t segment = begin / task.segment_chunks * task.segment_chunks + task.segment_chunks;
    end = begin + span < segment ? begin + span : segment;
    if (end > task.chunks) end = task.chunks;
    U sum = _mm256_setzero_si256(), magnitudes = sum;
    for (int64_t c = begin; c < end; c++) {
      const U here = load_lanes(reinterpret_cast<const uint8_t*>(x + c * task.together * 32));
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(one, here));
      magnitudes = _mm256_add_epi16(magnitudes, _mm256_maddubs_epi16(_mm256_abs_epi8(here), one));
    }
    put(begin, together(sum), together(magnitudes));
  }
}

// Where what narrow sums of a row begin with stands, of `words` for each chunk.
inline int32_t* starts_at(const SegmentTask& task, int32_t* starts, int64_t row, int64_t words) {
  return starts + (row / task.together * task.chunks * task.together + row % task.together) * words;
}

// Writes what narrow sums of a row begin with, where they are of codes of `bits` bits.
inline void begin_row(const SegmentTask& task, int64_t row, int bits) {
  const int64_t words = starts_of(bits);
  if (words == 0) return;
  int32_t* out = starts_at(task, task.starts, row, words);
  each_span(task, row, (span_of(bits) + 7) / 8, words, [&](int64_t begin, U sum, U) {
    int32_t start[8];
    sum = _mm256_mullo_epi16(sum, _mm256_set1_epi16(static_cast<int16_t>(-centre_of(bits))));
    store_lanes(reinterpret_cast<uint8_t*>(start), sum);
    for (int64_t i = 0; i < words; i++) out[begin * task.together * words + i] = start[i * 8 / words];
  });
}

// Whether segments are longer than spans, which may be twice as long.
inline bool doubles(const SegmentTask& task) {
  const int bits = task.bits;
  return bits >= 4 && bits <= 6 && task.segment_chunks * 8 > span_of(bits);
}

// The same in task.rests where spans are twice as long. Their sums fit an int16 as 2^(BITS-1) times the magnitudes of the
// activations that each adds up does, which is half of what these could be. A row of which one does not begins with kUnfit, which
// is no start of one that does: its upper half would be -32768.
constexpr int32_t kUnfit = INT32_MIN;
inline void begin_doubled(const SegmentTask& task, int64_t row) {
  const int bits = task.bits;
  int32_t* out = starts_at(task, task.rests, row, 1);
  const int most = 32767 >> (bits - 1);
  bool fit = true;
  each_span(task, row, 2 * span_of(bits) / 8, 1, [&](int64_t begin, U sum, U magnitudes) {
    const uint32_t both = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(magnitudes)));
    fit = fit && static_cast<int>(both & 0xffff) <= most && static_cast<int>(both >> 16) <= most;
    sum = _mm256_mullo_epi16(sum, _mm256_set1_epi16(static_cast<int16_t>(-centre_of(bits))));
    out[begin * task.together] = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
  });
  if (!fit) out[0] = kUnfit;
}

// Whether spans of all rows may be twice as long.
inline bool fits_doubled(const SegmentTask& task, int64_t rows) {
  for (int64_t row = 0; row < rows; row++)
    if (*starts_at(task, task.rests, row, 1) == kUnfit) return false;
  return true;
}

#undef FEWBIT_STEP
#undef FEWBIT_ROW
#undef FEWBIT_TOKEN
#undef FEWBIT_PAIR_ROW
#undef FEWBIT_PAIR_TOKEN
#undef FEWBIT_PAIRS

}  // namespace
}  // namespace fewbit
