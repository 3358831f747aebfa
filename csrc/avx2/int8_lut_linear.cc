// SPDX-License-Identifier: Apache-2.0
#include "avx2/dot.h"

#include "core/int8_lut.h"

namespace fewbit {

const LutKernels int8_lut_linear_avx2 = {
    kMostLevel,
    {kManyTokens, 1, 1, round_raised, int8_lut_run<LutBytes>},
    {kManyTokens, sizeof(Words::X), 1, round_token<Words::X>, int8_lut_run<LutWords>}};

}  // namespace fewbit
