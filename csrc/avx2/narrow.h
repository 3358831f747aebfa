// SPDX-License-Identifier: Apache-2.0
// Sums of many tokens: see core/spans.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "avx2/simd.h"

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
  "vmovdqa %[" C "], %[u]\n\t" MULTIPLY " %[u], %[a], %[p]\n\t" MULTIPLY " %[u], %[b], %[q]\n\t" ADD " %[p], %[" S         \
  "], %[" S "]\n\t" ADD " %[q], %[" T "], %[" T "]\n\t"

// An activation more by 128.
struct Raised {
  uint8_t byte;

  Raised() = default;
  explicit inline Raised(int32_t activation) : byte(static_cast<uint8_t>(activation + 128)) {}
};

// Codes c lowered to lie around 0, times activations x raised to 0 .. 255. A narrow sum is
// exact modulo 2^16, and begins at -128 times the sum of its codes: it ends at that of c * x, which fits an int16, as
// -2^(BITS-1) < c <= 2^(BITS-1) and -128 <= x < 128.
template <int BITS>
struct NarrowSum {
  using X = Raised;
  static constexpr int kSpan = 256 >> BITS > 64 ? 64 : 256 >> BITS, kCentre = (1 << (BITS - 1)) - 1;
  U wide = _mm256_setzero_si256();

  static inline U centred(U u) { return _mm256_sub_epi8(u, _mm256_set1_epi8(kCentre)); }
  static inline U less(U narrow, U u) {
    return _mm256_sub_epi16(narrow, _mm256_maddubs_epi16(_mm256_set1_epi8(-128), u));
  }
  static inline void step(U (&narrow)[4][2], const uint8_t* codes, const Raised* x, const Raised* next) {
    typedef int32_t Four __attribute__((may_alias));
    FEWBIT_STEP("vpbroadcastd", "vpmaddubsw", "vpaddw", Four);
  }
  inline void begin(F start) { wide = _mm256_add_epi32(wide, _mm256_cvtps_epi32(start)); }
  inline void flush(U narrow) { wide = _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1))); }
  inline void flush(U low, U high) {
    flush(low);
    wide = _mm256_add_epi32(wide, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
  inline F value() const { return _mm256_cvtepi32_ps(wide); }
};

// Levels of 16 bits: each plane holds four columns of every other two rows, whose halves are added up at the end.
struct NarrowWords {
  using X = int16_t;
  static constexpr int kSpan = 64;
  U wide = _mm256_setzero_si256();

  static inline void step(U (&narrow)[4][2], const uint8_t* codes, const X* x, const X* next) {
    typedef int64_t Four __attribute__((may_alias));
    FEWBIT_STEP("vpbroadcastq", "vpmaddwd", "vpaddd", Four);
  }
  static inline U less(U narrow, U) { return narrow; }
  inline void flush(U low, U high) { wide = _mm256_add_epi32(wide, _mm256_hadd_epi32(low, high)); }
  inline F value() const { return _mm256_cvtepi32_ps(wide); }
};

#undef FEWBIT_STEP
#undef FEWBIT_ROW

}  // namespace
}  // namespace fewbit
