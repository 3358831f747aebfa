// SPDX-License-Identifier: Apache-2.0
// y = x W^T for affine codes: the dot product of the codes themselves.
//
// A code is put together from its parts and converted where the first of them stands: lanes & (mask << s) is code * 2^s,
// an exact float, and the panel holds x * 2^-s, so that no shift is needed. (x * 2^-s loses bits only where |x| < 2^-96.)
// A part of 1 bit goes through tables of sums where there are such, as products of its own.
#pragma once

#include "core/tables.h"

namespace fewbit {
namespace {

// Bits of a code that are converted, and whether one more goes through tables.
constexpr bool tabled(int bits) { return kSumTables && bits % 2; }
constexpr int converted(int bits) { return bits - (tabled(bits) ? 1 : 0); }

constexpr int affine_panel(int bits) { return (converted(bits) ? 32 : 0) + (tabled(bits) ? table_floats(1) : 0); }

// The bit of a lane at which column k is converted: where it stands, or 0 where its highest bit would be taken for a sign.
constexpr int bit_of(int bits, int k) {
  const int bit = part_shift(part_width(bits, 0), k);
  return bit + bits < 32 ? bit : 0;
}

template <int BITS>
struct Affine {
  static constexpr int kBits = BITS, kPanel = affine_panel(BITS), kConverted = converted(BITS);
  static constexpr bool kFours = kLanes == 8 && part_count(BITS) == 1;

  explicit FEWBIT_INLINE Affine(const float*) {}

  template <int T, int M>
  FEWBIT_INLINE void chunk(const uint8_t* const (&codes)[T], const float* const (&panel)[M], F (&acc)[T][M]) const {
    if constexpr (kConverted != 0) {
#pragma GCC unroll kUnroll
      for (int k = 0; k < 32; k++) {
        const int bit = bit_of(kConverted, k);
        F w[T];
        for (int t = 0; t < T; t++)
          w[t] = convert(mask(extract<kConverted>(codes[t], k, bit), ((1u << kConverted) - 1) << bit));
        multiply_add(w, panel, k, acc);
      }
    }
    if constexpr (tabled(BITS)) table_chunk<1, T, M>(codes, kConverted, panel, kPanel - table_floats(1), acc);
  }

  FEWBIT_INLINE F value(const uint8_t* codes, int k) const {
    return convert(mask(extract<BITS>(codes, k), (1u << BITS) - 1));
  }
};

// What the activation of column k is multiplied by: see the top of this file.
template <int BITS>
struct Prescale {
  float at[32] = {};
  constexpr Prescale() {
    for (int k = 0; k < 32; k++) at[k] = 1.0f / static_cast<float>(1u << bit_of(BITS, k));
  }
};

template <int BITS>
void chunks_panel(const float* x, int64_t columns, int64_t chunks, float* out, int64_t stride) {
  constexpr int kConverted = converted(BITS);
  for (int64_t c = 0; c < chunks; c++, out += stride) {
    float here[32];
    chunk_of(x + c * 32, columns - c * 32, here);
    if constexpr (kConverted != 0) {
      static constexpr Prescale<kConverted> kPrescale;
      for (int k = 0; k < 32; k++) out[k] = here[k] * kPrescale.at[k];
    }
    if constexpr (tabled(BITS)) {
      constexpr float kLevels[2] = {0.0f, 1 << kConverted};
      table_panel_of<1>(kLevels, here, out + affine_panel(BITS) - table_floats(1));
    }
  }
}

inline int64_t affine_panel_floats(int32_t bits, bool generic) { return generic ? 32 : affine_panel(bits); }

inline void affine_panel_of(int32_t bits, bool generic, const float*, const float* x, int64_t columns, int64_t chunks,
                            float* out, int64_t stride) {
  if (generic) return plain_panels(x, columns, chunks, out, stride);
  switch (bits) {
    case 1: return chunks_panel<1>(x, columns, chunks, out, stride);
    case 2: return chunks_panel<2>(x, columns, chunks, out, stride);
    case 3: return chunks_panel<3>(x, columns, chunks, out, stride);
    case 4: return chunks_panel<4>(x, columns, chunks, out, stride);
    case 5: return chunks_panel<5>(x, columns, chunks, out, stride);
    case 6: return chunks_panel<6>(x, columns, chunks, out, stride);
    case 7: return chunks_panel<7>(x, columns, chunks, out, stride);
    case 8: return chunks_panel<8>(x, columns, chunks, out, stride);
  }
}

}  // namespace
}  // namespace fewbit
