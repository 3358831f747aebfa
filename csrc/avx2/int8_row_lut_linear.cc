// SPDX-License-Identifier: Apache-2.0
#include "avx2/signed.h"

#include "core/int8_row_lut.h"

namespace fewbit {

const Int8RowKernel int8_row_lut_linear_avx2 = {int8_row_prepare, int8_row_run};

}  // namespace fewbit
