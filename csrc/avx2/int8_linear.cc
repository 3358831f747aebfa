// SPDX-License-Identifier: Apache-2.0
#include "avx2/bit_tables_many.h"
#include "avx2/halves.h"

namespace fewbit {
namespace {

template <>
constexpr bool kFewElsewhere<Codes<1>> = true;  // by tables of bits

void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  if (task.arranged) return int8_strips<InHalves<Codes<3>>>(task, tile_begin, tile_end, tokens);
  int8_run(task, tile_begin, tile_end, tokens);
}

}  // namespace

const SegmentKernel int8_linear_avx2 = {kManyTokens, 1, 1, round_begun, run, kMostStarts};

const FewKernel int8_few_linear_avx2 = {1, {kManyTokens, kTableBytes / 32 + 1, 1, tables_token, bit_tables_run}};

const SegmentKernel int8_bits_linear_avx2 = {1, FourTables::kBytes / 32, 1, tables_beside, bits_beside_run};

}  // namespace fewbit
