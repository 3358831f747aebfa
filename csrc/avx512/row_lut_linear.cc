// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

#include "core/row_lut.h"

namespace fewbit {

const RowKernel row_lut_linear_avx512 = {row_lut_run, row_lut_decode};

}  // namespace fewbit
