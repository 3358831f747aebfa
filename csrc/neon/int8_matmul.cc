// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 4;

inline U pairs(U a, U b) {
  const int16x8_t x = vreinterpretq_s16_u32(a), y = vreinterpretq_s16_u32(b);
  return vreinterpretq_u32_s32(vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}

}  // namespace
}  // namespace fewbit

#include "core/int8_matmul.h"

namespace fewbit {

const MatmulKernel int8_matmul_neon = {matmul_pack, matmul_run};

}  // namespace fewbit
