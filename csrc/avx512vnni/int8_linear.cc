// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

// 16 sums for many tokens, beside 2 vectors of codes, in 32 registers; 8 sums hide the latency for one token.
constexpr int kDirect2 = 4, kDirect4 = 4, kDirect8 = 2, kDirectChains = 2, kManyTokens = 8;
constexpr bool kInPlace = true;
constexpr int direct1(int) { return 4; }
constexpr int many(int) { return 2; }
constexpr int planes(int) { return 1; }

// vpdpbusd adds four products of bytes to an int32 without an intermediate sum that could saturate.
template <int BITS>
struct Dot {
  static constexpr int kGroups = 8;
  static constexpr float kOrigin = 0;
  U sum = _mm512_setzero_si512();

  inline void add(U u, const int8_t* x) {
    int32_t lane;
    __builtin_memcpy(&lane, x, sizeof lane);
    sum = _mm512_dpbusd_epi32(sum, u, _mm512_set1_epi32(lane));
  }
  inline void flush() {}
  inline F value() const { return _mm512_cvtepi32_ps(sum); }
};

}  // namespace
}  // namespace fewbit

#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {

const Int8Kernel int8_linear_avx512vnni = {kManyTokens, round_token, int8_run};

}  // namespace fewbit
