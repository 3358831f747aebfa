// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

#include "core/row_lut.h"

namespace fewbit {

const RowKernel row_lut_linear_neon = {row_lut_run, row_lut_decode};

}  // namespace fewbit
