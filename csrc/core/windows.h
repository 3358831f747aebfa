// SPDX-License-Identifier: Apache-2.0
// What the driver and the per-ISA kernels of convolutions in groups agree on. Plain data only, as in kernel.h.
#pragma once

#include <stdint.h>

#include "fewbit.h"

namespace fewbit {

// Work on one group of channels. Positions are output positions in a row of memory, `width` of a panel's row each; those
// past the last window of a row see what lies beside, and count for nothing.
struct WindowsTask {
  int64_t rows, columns;  // of a group
  const float* weight;    // (rows, columns)
  const float* bias;      // (rows) or null
  const int64_t* tap;     // (columns): where in the panel position 0 sees a column; others see it as far behind as they are
  const float* panel;     // planes of the group's channels, zeros around
  int64_t positions;      // multiple of kMostPositions
  float* rounded;         // scratch (columns, kMostPositions)
  float* out;             // (rows, positions)
};

enum : int64_t { kMostPositions = 32 };  // that a kernel computes together, at most

// Convolution in groups on one instruction set.
struct WindowsKernel {
  void (*run)(const WindowsTask& task);
};

extern const WindowsKernel int8_windows_serial, int8_windows_avx2, int8_windows_avx512, int8_windows_neon;

// What windows must be.
bool well_formed(const fewbit_windows& windows);

}  // namespace fewbit
