// SPDX-License-Identifier: Apache-2.0
#include "avx512vnni/dot.h"

#include "core/fixed.h"

namespace fewbit {

const SegmentKernel fixed_linear_avx512vnni = {kDigitRows, 1, kDigits, digits_of, fixed_run};

}  // namespace fewbit
