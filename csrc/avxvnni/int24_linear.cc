// SPDX-License-Identifier: Apache-2.0
#include "avxvnni/dot.h"

#include "core/int24.h"

namespace fewbit {

const SegmentKernel int24_linear_avxvnni = {kDigitRows, 1, kDigits, digits_of, int24_run};

}  // namespace fewbit
