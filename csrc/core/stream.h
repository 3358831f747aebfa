// SPDX-License-Identifier: Apache-2.0
// The loop of fewbit_read_stream, compiled once for any processor and once for wide registers.
#pragma once

#include <stdint.h>

namespace fewbit {

uint64_t read_avx512(const uint8_t* data, int64_t bytes);  // read_places, with registers of 64 bytes

namespace {

constexpr int kPlaces = 4;       // read in turn: one stream alone does not keep memory busy
constexpr int64_t kAhead = 512;  // bytes fetched early

// A line, wherever it begins. GCC keeps these in registers; an array of words it stored and loaded again for each.
typedef uint64_t Words __attribute__((vector_size(64), aligned(1), may_alias));

// The exclusive or of all whole groups of 128 bytes, folded to 64 bits.
inline uint64_t read_places(const uint8_t* data, int64_t bytes) {
  const int64_t groups = bytes / 128, part = groups / kPlaces;
  Words all = {}, other = {};
  const auto take = [&](int64_t group) {
    const uint8_t* here = data + group * 128;
    for (int line = 0; line < 2; line++) __builtin_prefetch(here + kAhead + line * 64, 0, 2);
    all ^= *reinterpret_cast<const Words*>(here), other ^= *reinterpret_cast<const Words*>(here + 64);
  };
  for (int64_t group = 0; group < part; group++)
    for (int p = 0; p < kPlaces; p++) take(p * part + group);
  for (int64_t group = part * kPlaces; group < groups; group++) take(group);
  all ^= other;
  uint64_t folded = 0;
  for (int i = 0; i < 8; i++) folded ^= all[i];
  return folded;
}

}  // namespace
}  // namespace fewbit
