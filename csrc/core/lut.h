// SPDX-License-Identifier: Apache-2.0
// y = x W^T for codes that index a table of levels: up to 16 or 32 levels lie in registers, more in memory.
#pragma once

#include "core/tables.h"

namespace fewbit {
namespace {

constexpr bool lut_tabled(int bits) { return kSumTables && bits <= 2; }

template <int BITS>
struct Lut {
  static constexpr int kBits = BITS, kPanel = lut_tabled(BITS) ? table_floats(BITS) : 32;
  static constexpr bool kFours = false;
  Lookup<BITS> levels;

  explicit FEWBIT_INLINE Lut(const float* table) : levels(table) {}

  template <int T, int M>
  FEWBIT_INLINE void chunk(const uint8_t* const (&codes)[T], const float* const (&panel)[M], F (&acc)[T][M]) const {
    if constexpr (lut_tabled(BITS)) {
      table_chunk<BITS, T, M>(codes, 0, panel, 0, acc);
    } else if constexpr (BITS <= 6) {
#pragma GCC unroll kUnroll
      for (int k = 0; k < 32; k++) column(codes, panel, k, acc);
    } else {  // the gather costs more than the shifts, and more code would not make it faster
#pragma GCC unroll 2
      for (int k = 0; k < 32; k++) column(codes, panel, k, acc);
    }
  }

  template <int T, int M>
  FEWBIT_INLINE void column(const uint8_t* const (&codes)[T], const float* const (&panel)[M], int k,
                            F (&acc)[T][M]) const {
    F w[T];
    for (int t = 0; t < T; t++) w[t] = value(codes[t], k);
    multiply_add(w, panel, k, acc);
  }

  FEWBIT_INLINE F value(const uint8_t* codes, int k) const { return levels(extract<BITS>(codes, k)); }
};

inline int64_t lut_panel_floats(int32_t bits, bool generic) {
  return !generic && lut_tabled(bits) ? table_floats(bits) : 32;
}

inline void lut_panel_of(int32_t bits, bool generic, const float* table, const float* x, int64_t columns, int64_t chunks,
                         float* out, int64_t stride) {
  if (generic || !lut_tabled(bits)) return plain_panels(x, columns, chunks, out, stride);
  for (int64_t c = 0; c < chunks; c++, out += stride) {
    float here[32];
    chunk_of(x + c * 32, columns - c * 32, here);
    if (bits == 1) table_panel_of<1>(table, here, out);
    else table_panel_of<2>(table, here, out);
  }
}

}  // namespace
}  // namespace fewbit
