// SPDX-License-Identifier: Apache-2.0
#include "avx2/dot.h"

#include "core/int24.h"

namespace fewbit {
namespace {

// Digits of few tokens as they are, those of many raised.
void digits_raised(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  if (x.tokens <= 2) return digits_of<int8_t>(task, x, token);
  digits_of<Raised>(task, x, token);
}

}  // namespace

const SegmentKernel int24_linear_avx2 = {kDigitRows, 1, kDigits, digits_raised, int24_run};

}  // namespace fewbit
