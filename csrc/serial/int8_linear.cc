// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kDirect2 = 2, kDirect4 = 0, kDirect8 = 0, kDirectChains = 1, kManyTokens = 4;
constexpr bool kInPlace = false;
constexpr int direct1(int) { return 4; }
constexpr int many(int) { return 2; }
constexpr int planes(int) { return 1; }

template <int BITS>
struct Dot {
  static constexpr int kGroups = 8;
  static constexpr float kOrigin = 0;
  I sum = {};

  inline void add(U u, const int8_t* x) {
    for (uint32_t i = 0; i < 4; i++) sum += reinterpret_cast<I>(u >> (8 * i) & 255u) * x[i];
  }
  inline void flush() {}
  inline F value() const { return __builtin_convertvector(sum, F); }
};

}  // namespace
}  // namespace fewbit

#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {

const Int8Kernel int8_linear_serial = {kManyTokens, round_token, int8_run};

}  // namespace fewbit
