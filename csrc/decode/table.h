// SPDX-License-Identifier: Apache-2.0
// The row of the instruction set whose simd.h came before.
#pragma once

#include "decode/attention.h"
#include "decode/between.h"
#include "decode/draw.h"
#include "decode/places.h"

namespace fewbit {
namespace {

constexpr Steps kSteps = {norm,     add_to,   add_share, rotate, gate,        cap_to,       hadamard, mix,   scale_by,
                          round_to, split_at, softmax,   append, close_block, reopen_block, attend,   dense, largest,
                          shares,   cut,      sum};

}  // namespace
}  // namespace fewbit
