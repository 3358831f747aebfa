// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kWords = 1, kMost = 31;  // 31 chunks: a byte counts 8 bits of each, 248 at most
constexpr int kDirect1 = 4, kDirect2 = 4, kMany = 4, kManyTokens = 4;

using Signs = U;

struct Count {
  uint8x16_t bytes = vdupq_n_u8(0);

  inline void add(const Signs& signs, const uint32_t* x) {
    bytes = vaddq_u8(bytes, vcntq_u8(vreinterpretq_u8_u32(flip(signs, *x))));
  }
  inline U lanes() const { return vpaddlq_u16(vpaddlq_u8(bytes)); }
};

inline U sum(U a, U b) { return vaddq_u32(a, b); }

}  // namespace
}  // namespace fewbit

#include "core/xnor.h"

namespace fewbit {

const XnorKernel xnor_linear_neon = {kManyTokens, kWords, sign_token, xnor_run};

}  // namespace fewbit
