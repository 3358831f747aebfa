// SPDX-License-Identifier: Apache-2.0
#include "avx2/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kWords = 2, kMost = 31;  // 31 chunks: a byte counts 8 bits of each, 248 at most
constexpr int kDirect1 = 4, kDirect2 = 2, kMany = 2, kManyTokens = 4;

// Nibbles are taken apart before the exclusive or, so that this serves all tokens of the strip.
struct Signs {
  U low, high;
  Signs() = default;
  explicit Signs(U codes) : low(mask(codes, 0x0f0f0f0fu)), high(mask(shift_right(codes, 4), 0x0f0f0f0fu)) {}
};

// Set bits of each byte, which holds a nibble.
inline U bits_of(U nibbles) {
  const __m128i bits = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bits), nibbles);
}

struct Count {
  U bytes = _mm256_setzero_si256();

  inline void add(const Signs& signs, const uint32_t* x) {
    plus(bits_of(flip(signs.low, x[0])));
    plus(bits_of(flip(signs.high, x[1])));
  }
  // One after the other: GCC would reorder the sums, and spill some for all the lookups that it then keeps alive.
  inline void plus(U more) {
    bytes = _mm256_add_epi8(bytes, more);
    asm("" : "+x"(bytes));
  }
  inline U lanes() const {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
  }
};

inline U sum(U a, U b) { return _mm256_add_epi32(a, b); }

}  // namespace
}  // namespace fewbit

#include "core/xnor.h"

namespace fewbit {

const XnorKernel xnor_linear_avx2 = {kManyTokens, kWords, sign_token, xnor_run};

}  // namespace fewbit
