// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

#include "decode/table.h"

namespace fewbit {

const Steps decode_steps_serial = kSteps;

}  // namespace fewbit
