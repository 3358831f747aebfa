// SPDX-License-Identifier: Apache-2.0
#include "avx2/simd.h"

#include "decode/table.h"

namespace fewbit {

const Steps decode_steps_avx2 = kSteps;

}  // namespace fewbit
