// SPDX-License-Identifier: Apache-2.0
// How fast this processor does nothing but exclusive or, popcount and add, on registers: what the speed of a kernel of
// signs is a share of. `bench/xnor.py` compiles it for the machine it runs on.
//
// xnor_peak(rounds): signs counted, two operations each. apart = 1: with the nibbles of both sides apart beforehand,
// as our AVX2 kernel has them; the same loop where that makes no difference.
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// A value that the compiler must take for new each time, in a register.
template <class T>
inline void refresh(T& value) {
#if defined(__AVX2__)
  asm volatile("" : "+v"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+r"(value));
#endif
}

#if defined(__AVX512VPOPCNTDQ__)
typedef __m512i Vector;
constexpr int kChains = 8;

inline Vector fill(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Vector count(Vector a, Vector x, Vector, bool) { return _mm512_popcnt_epi32(_mm512_xor_si512(a, x)); }
inline Vector plus(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
#elif defined(__AVX2__)
typedef __m256i Vector;
constexpr int kChains = 4;

inline Vector fill(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Vector plus(Vector a, Vector b) { return _mm256_add_epi8(a, b); }
inline Vector lookup(Vector nibbles) {
  const __m128i bits = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bits), nibbles);
}
inline Vector count(Vector a, Vector x, Vector high, bool apart) {
  const Vector low = fill(0x0f0f0f0fu), d = _mm256_xor_si256(a, x);
  if (apart) return plus(lookup(d), lookup(_mm256_xor_si256(high, x)));
  return plus(lookup(_mm256_and_si256(d, low)), lookup(_mm256_and_si256(_mm256_srli_epi32(d, 4), low)));
}
#elif defined(__aarch64__)
typedef uint8x16_t Vector;
constexpr int kChains = 8;

inline Vector fill(uint32_t x) { return vreinterpretq_u8_u32(vdupq_n_u32(x)); }
inline Vector count(Vector a, Vector x, Vector, bool) { return vcntq_u8(veorq_u8(a, x)); }
inline Vector plus(Vector a, Vector b) { return vaddq_u8(a, b); }
#else
typedef uint64_t Vector;
constexpr int kChains = 4;

inline Vector fill(uint32_t x) { return x * 0x100000001ull; }
inline Vector count(Vector a, Vector x, Vector, bool) { return static_cast<Vector>(__builtin_popcountll(a ^ x)); }
inline Vector plus(Vector a, Vector b) { return a + b; }
#endif

template <bool APART>
int64_t run(int64_t rounds) {
  Vector sum[kChains], high[kChains], low[kChains], x = fill(0x05060708u);
  for (int i = 0; i < kChains; i++) {
    sum[i] = fill(0), low[i] = fill(0x01020304u), high[i] = fill(0x04030201u);
    refresh(low[i]), refresh(high[i]);
  }
  for (int64_t r = 0; r < rounds; r++) {
    refresh(x);
#pragma GCC unroll 8
    for (int i = 0; i < kChains; i++) sum[i] = plus(sum[i], count(low[i], x, high[i], APART));
  }
  for (int i = 0; i < kChains; i++) refresh(sum[i]);
  return rounds * kChains * static_cast<int64_t>(sizeof(Vector)) * 8;
}

}  // namespace

extern "C" int64_t xnor_peak(int64_t rounds, int apart) { return apart ? run<true>(rounds) : run<false>(rounds); }
