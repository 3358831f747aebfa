// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

namespace fewbit {
namespace {

constexpr int kAccumulators = 16;

}  // namespace
}  // namespace fewbit

#include "core/vector.h"

namespace fewbit {

const VectorKernel vector_linear_neon = {8, vector_run, vector_decode};

}  // namespace fewbit
