// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kWords = 1, kMost = 31;  // 31 chunks: a byte counts 8 bits of each, 248 at most
constexpr int kDirect1 = 4, kDirect2 = 2, kMany = 2, kManyTokens = 4;

using Signs = U;

struct Count {
  U bytes = {};

  // Set bits of pairs, nibbles and bytes, in place.
  inline void add(const Signs& signs, const uint32_t* x) {
    U v = flip(signs, *x);
    v -= v >> 1 & 0x55555555u;
    v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
    bytes += (v + (v >> 4)) & 0x0f0f0f0fu;
  }
  inline U lanes() const {
    const U pairs = (bytes & 0x00ff00ffu) + (bytes >> 8 & 0x00ff00ffu);
    return (pairs & 0xffffu) + (pairs >> 16);
  }
};

inline U sum(U a, U b) { return a + b; }

}  // namespace
}  // namespace fewbit

#include "core/xnor.h"

namespace fewbit {

const XnorKernel xnor_linear_serial = {kManyTokens, kWords, sign_token, xnor_run};

}  // namespace fewbit
