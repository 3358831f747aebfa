// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

namespace fewbit {
namespace {

constexpr int kAccumulators = 16;
constexpr int64_t kMost = 8;

}  // namespace
}  // namespace fewbit

#include "core/vector.h"

namespace fewbit {

const VectorKernel vector_linear_neon = {kMost, vector_run, vector_decode};

}  // namespace fewbit
