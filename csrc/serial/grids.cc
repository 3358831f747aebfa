// SPDX-License-Identifier: Apache-2.0
#include "core/column_sums.h"
#include "core/grid_round.h"
#include "core/table_search.h"

const fewbit::GridKernel fewbit::grids_serial = {grid_search_any, grid_round_any,   squares_any,
                                                 grid_sweep_any,  table_search_any, table_codes_any,
                                                 column_sums_any};
