// SPDX-License-Identifier: Apache-2.0
#include "avx2/simd.h"

#include "core/sparse.h"

namespace fewbit {

const SparseKernel sparse_add_avx2 = {add_window};

}  // namespace fewbit
