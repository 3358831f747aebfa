// SPDX-License-Identifier: Apache-2.0
// Few tokens as with the dot product; many by smmla, two at once.
#include "neondot/dot.h"

#include "core/int24.h"

namespace fewbit {

const SegmentKernel int24_linear_neoni8mm = {kDigitRows, 1, kDigits, digits_of, int24_run};

}  // namespace fewbit
