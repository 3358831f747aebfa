// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

#include "core/affine.h"

namespace fewbit {


}  // namespace fewbit
