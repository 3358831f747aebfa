// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kWords = 1, kMost = 64;  // chunks: 8 KiB of signs at a time
// 16 counts for many tokens, beside 2 vectors of signs, in 32 registers.
constexpr int kDirect1 = 4, kDirect2 = 4, kMany = 2, kManyTokens = 8;

using Signs = U;

inline U sum(U a, U b) { return _mm512_add_epi32(a, b); }

struct Count {
  U bits = _mm512_setzero_si512();

  inline void add(const Signs& signs, const uint32_t* x) {
    bits = sum(bits, _mm512_popcnt_epi32(flip(signs, *x)));
  }
  inline U lanes() const { return bits; }
};

}  // namespace
}  // namespace fewbit

#include "core/xnor.h"

namespace fewbit {

const XnorKernel xnor_linear_avx512vpopcnt = {kManyTokens, kWords, sign_token, xnor_run};

}  // namespace fewbit
