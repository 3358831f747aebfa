// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

#include "core/sparse.h"

namespace fewbit {

const SparseKernel sparse_add_serial = {add_window};

}  // namespace fewbit
