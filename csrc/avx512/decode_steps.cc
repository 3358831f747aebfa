// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

#include "decode/table.h"

namespace fewbit {

const Steps decode_steps_avx512 = kSteps;

}  // namespace fewbit
