// SPDX-License-Identifier: Apache-2.0
#include "neondot/dot.h"

#include "core/fixed.h"

namespace fewbit {

const SegmentKernel fixed_linear_neondot = {kDigitRows, 1, kDigits, digits_of, fixed_run};

}  // namespace fewbit
