// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

namespace fewbit {

struct Words4 {
  uint32_t word[4];
};

// Philox4x32 with 10 rounds: 128 random bits for each counter under each key (Salmon et al. 2011, "Parallel random
// numbers: as easy as 1, 2, 3").
inline Words4 philox(Words4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t even = uint64_t{0xD2511F53} * counter.word[0], odd = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(odd >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(odd),
                static_cast<uint32_t>(even >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(even)}};
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
  return counter;
}

// In [0, 1), a multiple of 2^-53.
inline double uniform(uint64_t seed, uint64_t position, uint32_t branch) {
  const Words4 counter = {{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), branch, 0}};
  const Words4 random = philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint64_t bits = uint64_t{random.word[0]} << 32 | random.word[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace fewbit
