// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

#include "core/lut.h"

namespace fewbit {

const Kernel lut_linear_avx512 = {lut_panel_floats, lut_panel_of, run<Lut>, decode<Lut>};

}  // namespace fewbit
