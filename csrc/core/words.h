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
  // Where bytes are shifted down, it is the low ones that lack something.
  static_assert(Sum::kOrigin == 0 || Sum::kOrigin == kHighOrigin, "one plane begins");
  static constexpr int kBegins = Sum::kOrigin == 0 ? 1 : 0;
  static constexpr float kOrigin = Sum::kOrigin == 0 ? -kHighOrigin : kHighOrigin;

  static inline void split(U low, U high, U (&plane)[2]) { plane[0] = low, plane[1] = high; }
  static inline F value(const Sum (&dot)[2]) {
    return add(dot[0].value(), multiply(dot[1].value(), broadcast(256.0f)));
  }
};

}  // namespace
}  // namespace fewbit
