// SPDX-License-Identifier: Apache-2.0
#include "avx2/dot.h"

#include "core/int8.h"

namespace fewbit {

const SegmentKernel int8_linear_avx2 = {kManyTokens, 1, 1, round_raised, int8_run};

}  // namespace fewbit
