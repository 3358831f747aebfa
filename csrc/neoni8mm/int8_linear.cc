// SPDX-License-Identifier: Apache-2.0
// Few tokens as with the dot product; many by smmla, two at once.
#include "neondot/dot.h"

#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {

const SegmentKernel int8_linear_neoni8mm = {kManyTokens, 1, 1, round_token<int8_t>, int8_run};

}  // namespace fewbit
