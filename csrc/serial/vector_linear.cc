// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

namespace fewbit {
namespace {

constexpr int kAccumulators = 8;

}  // namespace
}  // namespace fewbit

#include "core/vector.h"

namespace fewbit {

const VectorKernel vector_linear_serial = {4, vector_run, vector_decode};

}  // namespace fewbit
