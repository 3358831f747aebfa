// SPDX-License-Identifier: Apache-2.0
#include "avx2/bit_tables_many.h"
#include "avx2/halves.h"

namespace fewbit {
namespace {

template <>
constexpr bool kFewElsewhere<Codes<1>> = true;  // by tables of bits

void round_doubled(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_begun(task, x, token);
  if (task.together == kManyTokens && doubles(task)) begin_doubled(task, token);
}

// Codes whose sums stay in 16 bits for twice as many columns.
template <class K>
struct Doubled : K {
  struct Sum : K::Sum {
    using Narrow = NarrowSum<K::kBits, 2>;
  };
  using K::K;
};

void run_doubled(SegmentTask task, int64_t begin, int64_t end, int64_t tokens) {
  task.starts = task.rests;
  switch (task.bits) {
    case 4: return strips_spans<Doubled<Codes<4>>>(task, begin, end, tokens);
    case 5: return strips_spans<Doubled<Codes<5>>>(task, begin, end, tokens);
    case 6: return strips_spans<Doubled<Codes<6>>>(task, begin, end, tokens);
  }
}

void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  if (task.together == kManyTokens && doubles(task) && fits_doubled(task, tokens))
    return run_doubled(task, tile_begin * kGroupsPerTile, tile_end * kGroupsPerTile, tokens);
  if (task.arranged) return int8_strips<InHalves<Codes<3>>>(task, tile_begin, tile_end, tokens);
  int8_run(task, tile_begin, tile_end, tokens);
}

}  // namespace

const SegmentKernel int8_linear_avx2 = {kManyTokens, 1, 1, round_doubled, run, kMostStarts, 1};

const FewKernel int8_few_linear_avx2 = {1, {kManyTokens, kTableBytes / 32 + 1, 1, tables_token, bit_tables_run}};

const SegmentKernel int8_bits_linear_avx2 = {1, FourTables::kBytes / 32, 1, tables_beside, bits_beside_run};

}  // namespace fewbit
