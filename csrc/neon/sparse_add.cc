// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

#include "core/sparse.h"

namespace fewbit {

const SparseKernel sparse_add_neon = {add_window};

}  // namespace fewbit
