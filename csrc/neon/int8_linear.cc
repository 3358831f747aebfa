// SPDX-License-Identifier: Apache-2.0
#include "neon/dot.h"

#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {

const SegmentKernel int8_linear_neon = {kManyTokens, 1, 1, round_token<int8_t>, int8_run};

}  // namespace fewbit
