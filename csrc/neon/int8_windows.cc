// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 4;

// x / scale, correctly rounded by one correction (Markstein 1990), as a float16 scale has no inverse to fear: fused, it
// takes less time than dividing.
inline F quotient(F x, F scale, F inverse) {
  const F about = multiply(x, inverse);
  return fused(fused(-about, scale, x), inverse, about);
}

}  // namespace
}  // namespace fewbit

#include "core/int8_windows.h"

namespace fewbit {

const WindowsKernel int8_windows_neon = {windows_run};

}  // namespace fewbit
