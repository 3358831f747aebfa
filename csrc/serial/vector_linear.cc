// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

namespace fewbit {
namespace {

constexpr int kAccumulators = 8;
constexpr int64_t kMost = 4;

}  // namespace
}  // namespace fewbit

#include "core/vector.h"

namespace fewbit {

const VectorKernel vector_linear_serial = {kMost, vector_run, vector_decode};

}  // namespace fewbit
