// SPDX-License-Identifier: Apache-2.0
// fewbit_grids.h, on the caller's thread: callers have layers to share out.
#include <stddef.h>

#include <new>

#include "core/grids_kernel.h"
#include "fewbit.h"

namespace {

const fewbit::GridKernel& chosen(int32_t isa) {
#if defined(__x86_64__)
  if (fewbit_caps() & isa & FEWBIT_AVX2) return fewbit::grids_avx2;
#endif
  static_cast<void>(isa);
  return fewbit::grids_serial;
}

template <class Call>
int with_scratch(const Call& call, void (*search)(const Call& call, float* scratch)) {
  float* scratch = new (std::nothrow) float[static_cast<size_t>(fewbit::kGridScratch * call.block)];
  if (!scratch) return FEWBIT_NO_MEMORY;
  search(call, scratch);
  delete[] scratch;
  return FEWBIT_OK;
}

bool of_bytes(int32_t levels) { return levels >= 2 && levels <= 256; }

}  // namespace

extern "C" int fewbit_grid_search(const fewbit_grid_search_call* call, int32_t isa) {
  if (!call || !call->weight || !call->worth || !call->ratios || !call->scale || !call->zero) return FEWBIT_BAD_ARGUMENT;
  if (call->rows < 0 || call->columns <= 0 || call->block <= 0 || call->count < 0 || !of_bytes(call->levels))
    return FEWBIT_BAD_ARGUMENT;
  return with_scratch(*call, chosen(isa).search);
}

extern "C" int fewbit_grid_round(const fewbit_grid_round_call* call, int32_t isa) {
  if (!call || !call->weight || !call->scale || !call->codes || !call->sums)
    return FEWBIT_BAD_ARGUMENT;
  if (call->rows < 0 || call->columns <= 0 || call->block <= 0 || !of_bytes(call->levels)) return FEWBIT_BAD_ARGUMENT;
  chosen(isa).round(*call);
  return FEWBIT_OK;
}

extern "C" int fewbit_squares(const fewbit_squares_call* call, int32_t isa) {
  if (!call || !call->weight || !call->scale || !call->codes || !call->sums) return FEWBIT_BAD_ARGUMENT;
  if (call->rows < 0 || call->columns <= 0 || call->block <= 0) return FEWBIT_BAD_ARGUMENT;
  chosen(isa).squares(*call);
  return FEWBIT_OK;
}

extern "C" int fewbit_grid_sweep(const fewbit_grid_sweep_call* call, int32_t isa) {
  if (!call || !call->current || !call->before || !call->upper || !call->lost || !call->order || !call->scale ||
      !call->zero || !call->codes)
    return FEWBIT_BAD_ARGUMENT;
  if (call->rows < 0 || call->columns < 0 || call->columns > FEWBIT_SWEPT || call->block <= 0 ||
      !of_bytes(call->levels))
    return FEWBIT_BAD_ARGUMENT;
  chosen(isa).sweep(*call);
  return FEWBIT_OK;
}

extern "C" int fewbit_table_search(const fewbit_table_search_call* call, int32_t isa) {
  if (!call || !call->weight || !call->worth || !call->scales || !call->table || !call->bounds || !call->chosen)
    return FEWBIT_BAD_ARGUMENT;
  if (call->rows < 0 || call->blocks <= 0 || call->block <= 0 || call->count <= 0 || !of_bytes(call->levels))
    return FEWBIT_BAD_ARGUMENT;
  return with_scratch(*call, chosen(isa).table_search);
}

extern "C" int fewbit_table_codes(const float* values, int64_t tables, int64_t count, const float* bounds, int32_t bound_count,
                                  uint8_t* codes, int32_t isa) {
  if (tables == 0 || count == 0) return FEWBIT_OK;
  if (!values || !bounds || !codes || tables < 0 || count < 0 || !of_bytes(bound_count + 1)) return FEWBIT_BAD_ARGUMENT;
  for (int64_t t = 0; t < tables; t++)
    chosen(isa).table_codes(values + t * count, count, bounds + t * bound_count, bound_count, codes + t * count);
  return FEWBIT_OK;
}

extern "C" int fewbit_column_sums(const float* x, int64_t rows, int64_t columns, float* sums, int32_t isa) {
  if (rows < 0 || columns <= 0 || (!x && rows) || !sums) return FEWBIT_BAD_ARGUMENT;
  float* scratch = new (std::nothrow) float[static_cast<size_t>(4 * columns)];
  if (!scratch) return FEWBIT_NO_MEMORY;
  chosen(isa).column_sums(x, rows, columns, sums, scratch);
  delete[] scratch;
  return FEWBIT_OK;
}
