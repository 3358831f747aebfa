// SPDX-License-Identifier: Apache-2.0
// Codes times bfloat16 activations. A code less its centre has at most 8 significant bits: it is a bfloat16 exactly, and
// vdpbf16ps adds the exact products of two columns to a float32 at a time.
#include "avx512/simd.h"

namespace fewbit {
namespace {

constexpr int kUnrollMany = 1;  // see decoded.h

}  // namespace
}  // namespace fewbit

#include "core/decoded.h"
#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

// 16 sums beside 2 vectors of codes, in 32 registers.
constexpr int kMany = 2, kManyTokens = 8;

// Two columns a lane.
struct Pairs {
  static constexpr int kGroups = 8;
  F sum = _mm512_setzero_ps();

  inline void add(U u, const uint16_t* x) {
    int32_t two;
    memcpy(&two, x, sizeof two);
    const U columns = _mm512_set1_epi32(two);
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(u), reinterpret_cast<__m512bh>(columns));
  }
  inline void flush() {}
};

// Codes of the even columns of four, then those of the odd ones: each pair takes two of the activations.
template <int BITS>
struct Halves {
  static constexpr int kBits = BITS, kPlanes = 2, kFields = 1, kApart = 2;
  static constexpr int kTables = BITS <= 5 ? 1 : BITS == 6 ? 2 : 0;  // registers that hold what codes stand for
  using X = uint16_t;
  using Sum = Pairs;
  static constexpr int kBegins = -1;
  static constexpr float step = 1, origin = 0;
  float centre;
  U table[kTables > 0 ? kTables : 1];

  explicit FEWBIT_INLINE Halves(const SegmentTask& task) : centre(task.centre) {
    uint16_t levels[64] = {};
    for (int i = 0; kTables > 0 && i < 32 * kTables; i++)
      levels[i] = static_cast<uint16_t>(bits_of(static_cast<float>(i % (1 << BITS)) - centre) >> 16);
    for (int i = 0; i < kTables; i++) table[i] = _mm512_loadu_si512(levels + i * 32);
  }

  // Two codes a lane, in the lower halves of words, below other bits, as two bfloat16.
  FEWBIT_INLINE U words(U two) const {
    if constexpr (kTables == 1) {
      return _mm512_permutexvar_epi16(two, table[0]);
    } else if constexpr (kTables == 2) {
      return _mm512_permutex2var_epi16(table[0], two, table[1]);
    } else {
      const U codes = mask(two, 0x00ff00ffu);
      const F zero = broadcast(centre), high = _mm512_sub_ps(convert(shift_right(codes, 16)), zero);
      const F low = _mm512_sub_ps(convert(mask(codes, 0xffffu)), zero);
      return select(0xffff0000u, reinterpret_cast<U>(high), shift_right(reinterpret_cast<U>(low), 16));
    }
  }

  FEWBIT_INLINE void split(U codes, U (&plane)[2]) const {
    plane[0] = words(codes), plane[1] = words(shift_right(codes, 8));
  }

  FEWBIT_INLINE F value(const Pairs (&dot)[2]) const { return add(dot[0].sum, dot[1].sum); }
};

// Lays a token out as the kernel reads it, and sums up its segments.
void lay_out(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  constexpr int kAtOnce = 16;
  auto* out = static_cast<uint16_t*>(task.activations);
  out += (token / task.together * task.chunks * task.together + token % task.together) * 32;
  task.x_scale[token] = 1;
  for (int64_t s = 0, chunk = 0; s < task.segments; s++) {
    float sum[kAtOnce] = {};
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    for (; chunk < end; chunk++, out += task.together * 32) {
      const int64_t left = token < x.tokens ? task.columns - chunk * 32 : 0, columns = left < 32 ? left : 32;
      const auto* here = static_cast<const uint16_t*>(x.data) + token * x.stride + chunk * 32 * x.step;
      if (columns < 32) memset(out, 0, 64);
      for (int64_t k = 0; k < columns; k++) out[k % 4 == 1 ? k + 1 : k % 4 == 2 ? k - 1 : k] = here[k * x.step];
      for (int64_t k = 0; k < 32; k++) sum[k % kAtOnce] += from_bfloat16(out[k]);
    }
    for (int i = 1; i < kAtOnce; i++) sum[0] += sum[i];
    *sum_at(task, token, s) = sum[0];
  }
}

template <int BITS>
void strips(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  strips_decoded<Halves<BITS>, kMany, kManyTokens>(task, tile_begin, tile_end, tokens);
}

void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  switch (task.bits) {
    case 1: return strips<1>(task, tile_begin, tile_end, tokens);
    case 2: return strips<2>(task, tile_begin, tile_end, tokens);
    case 3: return strips<3>(task, tile_begin, tile_end, tokens);
    case 4: return strips<4>(task, tile_begin, tile_end, tokens);
    case 5: return strips<5>(task, tile_begin, tile_end, tokens);
    case 6: return strips<6>(task, tile_begin, tile_end, tokens);
    case 7: return strips<7>(task, tile_begin, tile_end, tokens);
    case 8: return strips<8>(task, tile_begin, tile_end, tokens);
  }
}

}  // namespace

const SegmentKernel bf16_linear_avx512bf16 = {kManyTokens, sizeof(uint16_t), 1, lay_out, run};

}  // namespace fewbit
