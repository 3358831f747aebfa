// SPDX-License-Identifier: Apache-2.0
// The loop of fewbit_read_stream, compiled once for any processor and once for wide registers.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fewbit {

uint64_t read_avx512(const uint8_t* data, int64_t bytes);  // read_places, with registers of 64 bytes

namespace {

constexpr int kPlaces = 4;        // read in turn: one stream alone does not keep memory busy
constexpr int64_t kAhead = 1024;  // bytes fetched early, which spares the start of every page

// The exclusive or of all whole groups of 128 bytes, folded to 64 bits.
inline uint64_t read_places(const uint8_t* data, int64_t bytes) {
  const int64_t groups = bytes / 128, part = groups / kPlaces;
  uint64_t chain[16] = {};
  const auto take = [&](int64_t group) {
    const uint8_t* here = data + group * 128;
    for (int line = 0; line < 2; line++) __builtin_prefetch(here + kAhead + line * 64, 0, 2);
    uint64_t words[16];
    memcpy(words, here, sizeof words);
    for (int i = 0; i < 16; i++) chain[i] ^= words[i];
  };
  for (int64_t group = 0; group < part; group++)
    for (int p = 0; p < kPlaces; p++) take(p * part + group);
  for (int64_t group = part * kPlaces; group < groups; group++) take(group);
  uint64_t all = 0;
  for (const uint64_t word : chain) all ^= word;
  return all;
}

}  // namespace
}  // namespace fewbit
