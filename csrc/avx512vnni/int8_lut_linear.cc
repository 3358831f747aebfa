// SPDX-License-Identifier: Apache-2.0
#include "avx512vnni/dot.h"

#include "core/int8_lut.h"
#include "core/rounding.h"

namespace fewbit {

const LutKernels int8_lut_linear_avx512vnni = {
    kMostLevel,
    {kManyTokens, 1, 1, round_token<int8_t>, int8_lut_run<LutBytes>},
    {kManyTokens, sizeof(Words::X), 1, round_token<Words::X>, int8_lut_run<LutWords>}};

}  // namespace fewbit
