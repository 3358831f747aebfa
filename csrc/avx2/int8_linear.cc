// SPDX-License-Identifier: Apache-2.0
#include "avx2/bit_tables_many.h"

namespace fewbit {
namespace {

template <>
constexpr bool kFewElsewhere<Codes<1>> = true;  // by tables of bits

}  // namespace

const SegmentKernel int8_linear_avx2 = {kManyTokens, 1, 1, round_begun, int8_run, kMostStarts};

const FewKernel int8_few_linear_avx2 = {3, {kManyTokens, kTableBytes / 32 + 1, 1, tables_token, bit_tables_run}};

const SegmentKernel int8_bits_linear_avx2 = {1, kTableBytes / 32 + 1, 1, tables_beside, bits_beside_run};

}  // namespace fewbit
