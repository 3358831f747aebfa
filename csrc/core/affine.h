// SPDX-License-Identifier: Apache-2.0
// y = x W^T for affine codes: the dot product of the codes themselves, a sum over the parts of a code.
//
// A part of 4 or 8 bits is converted where it stands: lanes & (mask << s) is code * 2^s, an exact float, and the
// panel holds x * 2^-s, so that no shift is needed. The top field of a lane is shifted down instead, because its
// sign bit would be misread. (x * 2^-s loses bits only where |x| < 2^-96.)
#pragma once

#include "core/tables.h"

namespace fewbit {
namespace {

// Parts that go through tables of sums.
constexpr bool tabled(int width) { return kSumTables && width <= 2; }

constexpr int part_floats(int width) { return tabled(width) ? table_floats(width) : 32; }

constexpr int affine_panel(int bits) {
  int floats = 0;
  for (int p = 0; p < part_count(bits); p++) floats += part_floats(part_width(bits, p));
  return floats;
}

template <int WIDTH, int T, int M>
FEWBIT_INLINE void convert_chunk(const uint8_t* const (&codes)[T], int vector, const float* const (&panel)[M],
                                 int at, F (&acc)[T][M][2]) {
  constexpr int kFields = 32 / WIDTH;
  constexpr uint32_t kMask = (1u << WIDTH) - 1;
#pragma GCC unroll kUnroll
  for (int j = 0; j < WIDTH; j++) {
    U lanes[T];
    for (int t = 0; t < T; t++) lanes[t] = load_lanes(codes[t] + (vector + j) * 64);
#pragma GCC unroll kUnroll
    for (int f = 0; f < kFields; f++) {
      F w[T];
      for (int t = 0; t < T; t++)
        w[t] = convert(f == kFields - 1 ? shift_right(lanes[t], 32 - WIDTH) : mask(lanes[t], kMask << (WIDTH * f)));
      for (int m = 0; m < M; m++) {
        const F x = broadcast(panel[m][at + j * kFields + f]);
        for (int t = 0; t < T; t++) acc[t][m][f & 1] = fma(w[t], x, acc[t][m][f & 1]);
      }
    }
  }
}

template <int BITS>
struct Affine {
  static constexpr int kBits = BITS, kPanel = affine_panel(BITS), kChains = 2;

  explicit FEWBIT_INLINE Affine(const float*) {}

  template <int T, int M>
  FEWBIT_INLINE void chunk(const uint8_t* const (&codes)[T], const float* const (&panel)[M], F (&acc)[T][M][2]) const {
    part<0, T, M>(codes, panel, 0, acc);
  }

  template <int P, int T, int M>
  FEWBIT_INLINE void part(const uint8_t* const (&codes)[T], const float* const (&panel)[M], int at,
                          F (&acc)[T][M][2]) const {
    constexpr int kWidth = part_width(BITS, P);
    if constexpr (kWidth != 0) {
      if constexpr (tabled(kWidth)) {
        table_chunk<kWidth, T, M>(codes, part_base(BITS, P), panel, at, acc);
      } else {
        convert_chunk<kWidth, T, M>(codes, part_base(BITS, P), panel, at, acc);
      }
      part<P + 1, T, M>(codes, panel, at + part_floats(kWidth), acc);
    }
  }

  FEWBIT_INLINE F value(const uint8_t* codes, int k) const {
    return convert(mask(extract<BITS>(codes, k), (1u << BITS) - 1));
  }
};

// Where a decoded weight serves many tokens, multiply-adds count and decoding does not: the parts of a code are put
// together first, nothing is tabled, and one mask serves every column, so that accumulators keep the registers.
template <int BITS>
struct AffineBatch {
  static constexpr int kBits = BITS, kPanel = 32, kChains = 1;

  explicit FEWBIT_INLINE AffineBatch(const float*) {}

  template <int T, int M>
  FEWBIT_INLINE void chunk(const uint8_t* const (&codes)[T], const float* const (&panel)[M], F (&acc)[T][M][1]) const {
#pragma GCC unroll kUnroll
    for (int k = 0; k < 32; k++) column(*this, codes, panel, k, acc);
  }

  FEWBIT_INLINE F value(const uint8_t* codes, int k) const {
    return convert(mask(extract<BITS>(codes, k), (1u << BITS) - 1));
  }
};

// What the activation at each place of a part of `width` bits is multiplied by: see the top of this file. Places are
// counted from bit 0 of the part's first vector.
struct Prescale {
  float at[32] = {};
  constexpr explicit Prescale(int width) {
    const int fields = 32 / width;
    for (int k = 0; k < 32; k++) {
      at[k] = 1.0f;
      for (int f = 0; f < k % fields && k % fields != fields - 1; f++) at[k] /= static_cast<float>(1 << width);
    }
  }
};

// The panel of one part of one chunk, in the order of the places.
template <int WIDTH>
FEWBIT_INLINE void part_panel(int base, const float (&x)[32], float* out) {
  float placed[32];
  place<WIDTH>(x, placed);
  if constexpr (tabled(WIDTH)) {
    float levels[1 << WIDTH];
    for (int d = 0; d < 1 << WIDTH; d++) levels[d] = static_cast<float>(d << base);
    table_panel<WIDTH>(levels, placed, out);
  } else {
    static constexpr Prescale kPrescale(WIDTH);
    const float up = static_cast<float>(1 << base);
    for (int k = 0; k < 32; k++) out[k] = placed[k] * (kPrescale.at[k] * up);
  }
}

inline void single_panel(int32_t bits, const float (&x)[32], float* out) {
  for (int p = 0; p < part_count(bits); p++) {
    const int width = part_width(bits, p), base = part_base(bits, p);
    switch (width) {
      case 8: part_panel<8>(base, x, out); break;
      case 4: part_panel<4>(base, x, out); break;
      case 2: part_panel<2>(base, x, out); break;
      case 1: part_panel<1>(base, x, out); break;
    }
    out += part_floats(width);
  }
}

inline int64_t affine_panel_floats(int32_t bits, Mode mode) { return mode == kSingle ? affine_panel(bits) : 32; }

inline void affine_panel_of(int32_t bits, Mode mode, const float*, const float* x, int64_t columns, int64_t chunks,
                            float* out, int64_t stride) {
  for (int64_t c = 0; c < chunks; c++, out += stride) {
    float here[32];
    chunk_of(x + c * 32, columns - c * 32, here);
    if (mode == kSingle) single_panel(bits, here, out);
    else plain_panel(here, out);
  }
}

}  // namespace
}  // namespace fewbit
