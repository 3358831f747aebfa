// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

#include "decode/table.h"

namespace fewbit {

const Steps decode_steps_neon = kSteps;

}  // namespace fewbit
