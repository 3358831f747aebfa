// SPDX-License-Identifier: Apache-2.0
// Levels of 16 bits as two planes of bytes, where Dot<8> takes any byte. Included after an ISA's Dot.
#pragma once

#include <stdint.h>

namespace fewbit {
namespace {

constexpr int kLevelBits = 8;

// level = 256 * (high - 128) + low. Both sums are exact in float32, as 255 * 128 * 256 columns < 2^24; their last
// addition rounds once, as converting the sum of levels times activations would.
struct Words {
  static constexpr int kHighOrigin = 128;
  using X = int8_t;
  using Sum = Dot<8>;

  static inline void split(U low, U high, U (&plane)[2]) { plane[0] = low, plane[1] = high; }
  static inline F value(const Sum (&dot)[2], float sum) {
    const F low = add(dot[0].value(), broadcast(Sum::kOrigin * sum));
    const F high = add(dot[1].value(), broadcast((Sum::kOrigin - kHighOrigin) * sum));
    return add(low, multiply(high, broadcast(256.0f)));
  }
};

}  // namespace
}  // namespace fewbit
