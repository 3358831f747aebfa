// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 2;

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Lanes dot(Lanes sum, Lanes a, Lanes b) {
  return sum + (Lanes)_mm512_madd_epi16((U)a, (U)b);
}

}  // namespace
}  // namespace fewbit

#include "core/int8_matmul.h"

namespace fewbit {

const MatmulKernel int8_matmul_avx512 = {matmul_pack, matmul_run};

}  // namespace fewbit
