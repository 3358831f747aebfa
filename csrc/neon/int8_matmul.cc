// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 4;

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Lanes dot(Lanes sum, Lanes a, Lanes b) {
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return sum + (Lanes)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}

}  // namespace
}  // namespace fewbit

#include "core/int8_matmul.h"

namespace fewbit {

const MatmulKernel int8_matmul_neon = {matmul_pack, matmul_run};

}  // namespace fewbit
