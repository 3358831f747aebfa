// SPDX-License-Identifier: Apache-2.0
// y = x W^T for codes that index a table of levels: up to 16 or 32 levels lie in registers, more in memory.
#pragma once

#include "core/tables.h"

namespace fewbit {
namespace {

constexpr bool lut_tabled(int bits) { return kSumTables && bits <= 2; }

template <int BITS, int CHAINS>
struct LutOf {
  static constexpr bool kTabled = CHAINS == 2 && lut_tabled(BITS);
  static constexpr int kBits = BITS, kPanel = kTabled ? table_floats(BITS) : 32, kChains = CHAINS;
  Lookup<BITS> levels;

  explicit FEWBIT_INLINE LutOf(const float* table) : levels(table) {}

  template <int T, int M>
  FEWBIT_INLINE void chunk(const uint8_t* const (&codes)[T], const float* const (&panel)[M],
                           F (&acc)[T][M][CHAINS]) const {
    if constexpr (kTabled) {
      table_chunk<BITS, T, M>(codes, 0, panel, 0, acc);
    } else if constexpr (BITS <= 6) {
#pragma GCC unroll kUnroll
      for (int k = 0; k < 32; k++) column(*this, codes, panel, k, acc);
    } else {  // the gather costs more than the shifts, and more code would not make it faster
#pragma GCC unroll 2
      for (int k = 0; k < 32; k++) column(*this, codes, panel, k, acc);
    }
  }

  FEWBIT_INLINE F value(const uint8_t* codes, int k) const { return levels(extract<BITS>(codes, k)); }
};

template <int BITS>
using Lut = LutOf<BITS, 2>;

// Where a decoded weight serves many tokens: no sums of products are tabled.
template <int BITS>
using LutBatch = LutOf<BITS, 1>;

template <int BITS>
FEWBIT_INLINE void table_panel_of(const float* table, const float (&x)[32], float* out) {
  float placed[32];
  place<BITS>(x, placed);
  table_panel<BITS>(table, placed, out);
}

inline int64_t lut_panel_floats(int32_t bits, Mode mode) {
  return mode == kSingle && lut_tabled(bits) ? table_floats(bits) : 32;
}

inline void lut_panel_of(int32_t bits, Mode mode, const float* table, const float* x, int64_t columns, int64_t chunks,
                         float* out, int64_t stride) {
  for (int64_t c = 0; c < chunks; c++, out += stride) {
    float here[32];
    chunk_of(x + c * 32, columns - c * 32, here);
    if (mode != kSingle || !lut_tabled(bits)) plain_panel(here, out);
    else if (bits == 1) table_panel_of<1>(table, here, out);
    else table_panel_of<2>(table, here, out);
  }
}

}  // namespace
}  // namespace fewbit
