// SPDX-License-Identifier: Apache-2.0
// Included after a simd.h that fuses in one instruction.
#pragma once

namespace fewbit {
namespace {

// x / scale, correctly rounded by one correction (Markstein 1990), as a float16 scale has no inverse to fear: fused, it
// takes less time than dividing.
inline F quotient(F x, F scale, F inverse) {
  const F about = multiply(x, inverse);
  return fused(fused(-about, scale, x), inverse, about);
}

}  // namespace
}  // namespace fewbit
