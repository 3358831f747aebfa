// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "serial/simd.h"

#include "core/kernel.h"

namespace fewbit {
namespace {

constexpr int kDirect2 = 1, kDirect4 = 0, kDirect8 = 0, kDirectChains = 1, kAlone = 0, kAlone2 = 0, kMany = 1, kManyTokens = 4;
constexpr int kDigits2 = 1, kAloneDigits = 0, kManyDigits = 1;
constexpr int direct1(int) { return 1; }
constexpr int digits1(int) { return 1; }
constexpr int planes(int) { return 1; }
constexpr bool kInPlace = false;
constexpr bool kFew = false;
constexpr int kSums = 0, kUnrollMany = 1;
constexpr int kRowsBeside = 2;
constexpr int kByteOrigin = 0;

inline void totals_of(const U* sum, int32_t* out) {
  for (int i = 0; i < 4; i++) {
    const I lanes = reinterpret_cast<I>(sum[i]);
    out[i] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
}

// Four products of bytes, unsigned times signed, added to each lane.
inline U multiply_add(U sum, U u, U x) {
  for (int i = 0; i < 4; i++) {
    const I signed_byte = reinterpret_cast<I>(x << static_cast<uint32_t>(24 - 8 * i)) >> 24;
    sum += (u >> static_cast<uint32_t>(8 * i) & 255u) * reinterpret_cast<U>(signed_byte);
  }
  return sum;
}

template <int BITS>
struct Dot {
  static constexpr int kGroups = 8;
  static constexpr float kOrigin = 0;
  I sum = {};

  inline void add(U u, const int8_t* x) {
    for (uint32_t i = 0; i < 4; i++) sum += reinterpret_cast<I>(u >> (8 * i) & 255u) * x[i];
  }
  inline void begin(F start) { sum += __builtin_convertvector(start, I); }
  inline void flush() {}
  inline F value() const { return __builtin_convertvector(sum, F); }
};

struct Shuffle {
  uint8_t table[16];
  Shuffle() = default;
  explicit Shuffle(const uint8_t* bytes) { memcpy(table, bytes, sizeof table); }
  U operator()(U index) const {
    uint8_t at[16];
    memcpy(at, &index, sizeof at);
    for (uint8_t& byte : at) byte = table[byte];
    memcpy(&index, at, sizeof at);
    return index;
  }
  U within(U index) const {
    uint8_t at[16];
    memcpy(at, &index, sizeof at);
    for (uint8_t& byte : at) byte = byte < 16 ? table[byte] : 0;
    memcpy(&index, at, sizeof at);
    return index;
  }
};

}  // namespace
}  // namespace fewbit

#include "core/words.h"
