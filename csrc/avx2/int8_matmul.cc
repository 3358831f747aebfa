// SPDX-License-Identifier: Apache-2.0
#include "avx2/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 2;

inline U pairs(U a, U b) { return _mm256_madd_epi16(a, b); }

}  // namespace
}  // namespace fewbit

#include "core/int8_matmul.h"

namespace fewbit {

const MatmulKernel int8_matmul_avx2 = {matmul_pack, matmul_run};

}  // namespace fewbit
