// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 2;

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

// Lanes are pairs of words, the lower one first.
inline Lanes dot(Lanes sum, Lanes a, Lanes b) {
  const U low_a = (U)a << 16, low_b = (U)b << 16;
  return sum + ((Lanes)low_a >> 16) * ((Lanes)low_b >> 16) + (a >> 16) * (b >> 16);
}

}  // namespace
}  // namespace fewbit

#include "core/int8_matmul.h"

namespace fewbit {

const MatmulKernel int8_matmul_serial = {matmul_pack, matmul_run};

}  // namespace fewbit
