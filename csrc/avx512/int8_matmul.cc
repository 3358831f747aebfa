// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 2;

inline U pairs(U a, U b) { return _mm512_madd_epi16(a, b); }

}  // namespace
}  // namespace fewbit

#include "core/int8_matmul.h"

namespace fewbit {

const MatmulKernel int8_matmul_avx512 = {matmul_pack, matmul_run};

}  // namespace fewbit
