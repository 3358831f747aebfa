// SPDX-License-Identifier: Apache-2.0
#pragma once

// For the pieces of inner loops, which are nothing by themselves.
#define FEWBIT_INLINE inline __attribute__((always_inline))
// For what is a call of its own: it has all registers to itself, and is compiled once for those that call it.
#define FEWBIT_APART __attribute__((noinline))
