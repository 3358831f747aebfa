// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

#include "core/lut.h"

namespace fewbit {

const Kernel lut_linear_neon = {lut_panel_floats, lut_panel_of, run<Lut>, decode<Lut>};

}  // namespace fewbit
