// SPDX-License-Identifier: Apache-2.0
// Few tokens as with the dot product; many by smmla, two at once.
#include "neondot/dot.h"

#include "core/int8_lut.h"
#include "core/rounding.h"

namespace fewbit {

const LutKernels int8_lut_linear_neoni8mm = {
    kMostLevel,
    {kManyTokens, 1, 1, round_token<int8_t>, int8_lut_run<LutBytes>},
    {kManyTokens, sizeof(Words::X), 1, round_token<Words::X>, int8_lut_run<LutWords>}};

}  // namespace fewbit
