// SPDX-License-Identifier: Apache-2.0
// What the driver of fewbit_grids.h and each instruction set agree on. Plain data only, as in kernel.h.
#pragma once

#include "fewbit_grids.h"

namespace fewbit {

// Even grids and tables on one instruction set: see fewbit_grid_search and fewbit_table_search, with kGridScratch
// floats of scratch for each weight of a block, fewbit_grid_round, fewbit_squares, fewbit_grid_sweep and
// fewbit_column_sums.
constexpr int kGridLanes = 8, kGridScratch = 3 * kGridLanes;
struct GridKernel {
  void (*search)(const fewbit_grid_search_call& call, float* scratch);
  void (*round)(const fewbit_grid_round_call& call);
  void (*squares)(const fewbit_squares_call& call);
  void (*sweep)(const fewbit_grid_sweep_call& call);
  void (*table_search)(const fewbit_table_search_call& call, float* scratch);
  void (*table_codes)(const float* values, int64_t count, const float* bounds, int32_t bound_count, uint8_t* codes);
  void (*column_sums)(const float* x, int64_t rows, int64_t columns, float* sums, float* scratch);  // of 4 * columns
};

extern const GridKernel grids_serial, grids_avx2;

}  // namespace fewbit
