// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

#include "core/int24_lut.h"
#include "core/segments.h"

namespace fewbit {
namespace {

void prepare(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  float* out = row_of<float>(task, token);
  products_of(task, x, token, Levels24(task),
              [&](int64_t chunk, const float* here) { memcpy(out + chunk * 32, here, 32 * sizeof(float)); });
}

// One row group of one token, product by product.
template <int BITS>
void multiply(const SegmentTask& task, const Levels24& levels, int64_t group, int64_t token) {
  const Group rows(task, group);
  const auto* x = row_of<float>(task, token);
  F total = broadcast(0.0f);
  int64_t chunk = 0;
  for (Segment segment(task); segment.index < task.segments; segment.advance(task)) {
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    I sum = {};
    for (; chunk < end; chunk++)
      for (int k = 0; k < 32; k++) {
        const U code = mask(extract<BITS>(rows.codes + chunk * BITS * 64, k), (1u << BITS) - 1);
        for (int r = 0; r < kLanes; r++) sum[r] += product24(x[chunk * 32 + k], levels.level[code[r]]);
      }
    const Line line(task, 1, rows.parameters + segment.weight);
    total = settle(settling(task), Tokens<1>(task, segment, token), 0, convert(reinterpret_cast<U>(sum)), line, total);
  }
  finish<1>(task, rows.row, token, 1, [&](int) { return total; });
}

template <int BITS>
void groups(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  const Levels24 levels(task);
  for (int64_t group = begin; group < end; group++)
    for (int64_t token = 0; token < tokens; token++) multiply<BITS>(task, levels, group, token);
}

void run_serial(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  switch (task.bits) {
    case 1: return groups<1>(task, begin, end, tokens);
    case 2: return groups<2>(task, begin, end, tokens);
    case 3: return groups<3>(task, begin, end, tokens);
    case 4: return groups<4>(task, begin, end, tokens);
  }
}

}  // namespace

const SegmentKernel int24_lut_linear_serial = {1, sizeof(float), 1, prepare, run_serial};

}  // namespace fewbit
