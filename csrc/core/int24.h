// SPDX-License-Identifier: Apache-2.0
// Codes times activations of 24 bits: a token becomes kDigits rows of signed bytes, the digits of its integers to base 256,
// lowest first. Included after an ISA's dot.h.
#pragma once

#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int kDigitRows = 2 * kDigits;  // computed together where there are many

// See FEWBIT_INT24.
inline void digits_of(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  constexpr int32_t kMargin = 0x20000;  // below a power of two, by which no highest digit exceeds 127
  const int64_t row = token * kDigits, apart = task.together * 32;
  const int32_t most = token < x.tokens ? largest(x, token, 0, task.columns) : 0;
  const int32_t power = (most + kMargin) >> 23, least = 23, step = (power > least ? power : least) - 22;
  const bool finite = most < kInfinityBits;
  const float inverse = float_of(static_cast<uint32_t>(254 - step) << 23);
  int8_t* out[kDigits];
  for (int d = 0; d < kDigits; d++) {
    task.x_scale[row + d] = float_of(finite ? static_cast<uint32_t>(step + 8 * d) << 23 : kNaNBits);
    out[d] = row_of<int8_t>(task, row + d);
  }
  for (int64_t s = 0, chunk = 0; s < task.segments; s++) {
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    int32_t sum[kDigits] = {};
    for (; chunk < end; chunk++) {
      float here[32] = {}, buffer[32];
      const int64_t left = task.columns - chunk * 32, count = left < 32 ? left : 32;
      if (finite && token < x.tokens)
        memcpy(here, floats(x, token, chunk * 32, count, buffer), static_cast<size_t>(count) * sizeof(float));
      int32_t q[32];
      for (int k = 0; k < 32; k++) {
        const float scaled = here[k] * inverse;
        q[k] = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
      }
      for (int d = 0; d < kDigits; d++) {
        for (int k = 0; k < 32; k++) {
          const int32_t digit = static_cast<int8_t>(q[k]);
          out[d][k] = static_cast<int8_t>(digit);
          sum[d] += digit;
          q[k] = (q[k] - digit) >> 8;
        }
        out[d] += apart;
      }
    }
    for (int d = 0; d < kDigits; d++) *sum_at(task, row + d, s) = static_cast<float>(sum[d]);
  }
}

template <class K>
void int24_strips(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile, rows = tokens * kDigits;
  constexpr int groups = digits1(K::kBits);
  if constexpr (kFew && groups > 1) {
    const bool settled = task.segment_chunks > 1;  // shorter segments would cost more to keep than to settle at once
    if (settled && task.together == kDigits) return strips_settled<K, groups, kDigits>(task, tile_begin, rows);
    if (settled && tokens <= 2) return strips_settled<K, groups, kDigitRows>(task, tile_begin, rows);
  }
  if (task.together == kDigits) {
    if constexpr (K::kFields * kDigits <= kSums) return strips_few<K, groups, kDigits, kAloneDigits>(task, begin, end, rows);
    return strips_direct<K, share<K>(groups), kDigits, 1>(task, begin, end, rows);
  }
  if (tokens <= 2) return strips_direct<K, share<K>(kDigits2), kDigitRows, 1>(task, begin, end, rows);
  if constexpr (kHasSpans<typename K::Sum>)
    strips_blocks<K, kDigitRows>(task, begin, end, rows);
  else
    strips_decoded<K, kManyDigits, kDigitRows>(task, begin, end, rows);
}

inline void int24_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.bits) {
    case 1: return int24_strips<Codes<1>>(task, tile_begin, tile_end, tokens);
    case 2: return int24_strips<Codes<2>>(task, tile_begin, tile_end, tokens);
    case 3: return int24_strips<Codes<3>>(task, tile_begin, tile_end, tokens);
    case 4: return int24_strips<Codes<4>>(task, tile_begin, tile_end, tokens);
    case 5: return int24_strips<Codes<5>>(task, tile_begin, tile_end, tokens);
    case 6: return int24_strips<Codes<6>>(task, tile_begin, tile_end, tokens);
    case 7: return int24_strips<Codes<7>>(task, tile_begin, tile_end, tokens);
    case 8: return int24_strips<Codes<8>>(task, tile_begin, tile_end, tokens);
  }
}

}  // namespace
}  // namespace fewbit
