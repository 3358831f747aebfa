// SPDX-License-Identifier: Apache-2.0
// Floats to integers by adding, and the bits of what is no number.
#pragma once

#include <stdint.h>

namespace fewbit {
namespace {

// Adding kRound rounds |x| < 2^22 to an integer, by which the bits of the sum differ from those of kRound; where x is
// larger, they differ by more. So both rounding and clamping are of integers.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRoundBits = 0x4b400000, kInfinityBits = 0x7f800000;
constexpr uint32_t kNaNBits = 0x7fc00000u;

}  // namespace
}  // namespace fewbit
