// SPDX-License-Identifier: Apache-2.0
#include "avx2/dot.h"

#include "core/int24.h"

namespace fewbit {
namespace {

void digits_begun(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  digits_of(task, x, token);
  for (int64_t d = 0; d < kDigits && x.tokens > 2; d++) begin_row(task, token * kDigits + d, bits_beside(task));
}

}  // namespace

const SegmentKernel int24_linear_avx2 = {kDigitRows, 1, kDigits, digits_begun, int24_run, kMostStarts};

}  // namespace fewbit
