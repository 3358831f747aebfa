// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

#include "core/affine.h"

namespace fewbit {

const Kernel affine_linear_avx512 = {affine_panel_floats, affine_panel_of, run<Affine>, decode<Affine>};

}  // namespace fewbit
