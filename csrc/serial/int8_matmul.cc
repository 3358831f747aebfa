// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 2;

// Lanes are pairs of words, the lower one first.
inline U pairs(U a, U b) {
  const I low = ((I)(a << 16) >> 16) * ((I)(b << 16) >> 16), high = ((I)a >> 16) * ((I)b >> 16);
  return (U)(low + high);
}

}  // namespace
}  // namespace fewbit

#include "core/int8_matmul.h"

namespace fewbit {

const MatmulKernel int8_matmul_serial = {matmul_pack, matmul_run};

}  // namespace fewbit
