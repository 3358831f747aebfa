// SPDX-License-Identifier: Apache-2.0
// For the pieces of inner loops, which are nothing by themselves.
#pragma once

#define FEWBIT_INLINE inline __attribute__((always_inline))
