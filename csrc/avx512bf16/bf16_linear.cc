// SPDX-License-Identifier: Apache-2.0
// Codes times bfloat16 activations. A code less its centre has at most 8 significant bits: it is a bfloat16 exactly, and
// vdpbf16ps adds the exact products of two columns to a float32 at a time.
#include "avx512/simd.h"

#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/segments.h"

namespace fewbit {
namespace {

// 16 sums beside 2 vectors of codes, in 32 registers.
constexpr int kMany = 2, kManyTokens = 8;

// Four columns of every other two rows: pairs of columns in neighbouring lanes, which are added up at the end.
struct Pairs {
  static constexpr int kGroups = 8;
  F sum = _mm512_setzero_ps();

  inline void add(U u, const uint16_t* x) {
    int64_t four;
    memcpy(&four, x, sizeof four);
    const U columns = _mm512_set1_epi64(four);
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(u), reinterpret_cast<__m512bh>(columns));
  }
  inline void flush() {}
};

// The upper halves of two floats that are bfloat16 exactly, as one lane.
inline U paired(F low, F high) {
  return select(0xffff0000u, reinterpret_cast<U>(high), shift_right(reinterpret_cast<U>(low), 16));
}

// Codes up to 4 bits are looked up: the low and the high bytes of what they stand for.
template <int BITS>
struct Halves {
  static constexpr int kBits = BITS, kPlanes = 2;
  static constexpr bool kLookedUp = BITS <= 4;
  using X = uint16_t;
  using Sum = Pairs;
  float centre;
  U low, high;

  explicit FEWBIT_INLINE Halves(const SegmentTask& task) : centre(task.centre) {
    uint8_t bytes[2][16] = {};
    for (int code = 0; kLookedUp && code < 1 << BITS; code++) {
      const uint32_t bits = bits_of(static_cast<float>(code) - centre);
      bytes[0][code] = static_cast<uint8_t>(bits >> 16), bytes[1][code] = static_cast<uint8_t>(bits >> 24);
    }
    low = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[0])));
    high = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes[1])));
  }

  FEWBIT_INLINE U words(U two) const {
    const F zero = broadcast(centre);
    return paired(_mm512_sub_ps(convert(mask(two, 0xffffu)), zero), _mm512_sub_ps(convert(shift_right(two, 16)), zero));
  }

  FEWBIT_INLINE void split(U codes, U (&plane)[2]) const {
    if constexpr (kLookedUp) {
      const U lows = _mm512_shuffle_epi8(low, codes), highs = _mm512_shuffle_epi8(high, codes);
      plane[0] = _mm512_unpacklo_epi8(lows, highs), plane[1] = _mm512_unpackhi_epi8(lows, highs);
    } else {
      const U none = _mm512_setzero_si512();
      plane[0] = words(_mm512_unpacklo_epi8(codes, none)), plane[1] = words(_mm512_unpackhi_epi8(codes, none));
    }
  }

  FEWBIT_INLINE F value(const Pairs (&dot)[2], float) const {
    return add(_mm512_shuffle_ps(dot[0].sum, dot[1].sum, 0x88), _mm512_shuffle_ps(dot[0].sum, dot[1].sum, 0xdd));
  }
};

// Lays a token out as the kernel reads it, and sums up its segments.
void lay_out(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  constexpr int kChains = 16;
  auto* out = static_cast<uint16_t*>(task.activations);
  out += (token / task.together * task.chunks * task.together + token % task.together) * 32;
  task.x_scale[token] = 1;
  for (int64_t s = 0, chunk = 0; s < task.segments; s++) {
    float sum[kChains] = {};
    const int64_t end = chunk + task.segment_chunks < task.chunks ? chunk + task.segment_chunks : task.chunks;
    for (; chunk < end; chunk++, out += task.together * 32) {
      const int64_t left = token < x.tokens ? task.columns - chunk * 32 : 0, columns = left < 32 ? left : 32;
      const auto* here = static_cast<const uint16_t*>(x.data) + token * x.stride + chunk * 32 * x.step;
      if (columns < 32) memset(out, 0, 64);
      for (int64_t k = 0; k < columns; k++) out[k] = here[k * x.step];
      for (int64_t k = 0; k < 32; k++) sum[k % kChains] += from_bfloat16(out[k]);
    }
    for (int i = 1; i < kChains; i++) sum[0] += sum[i];
    task.sums[token * task.segments + s] = sum[0];
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

const SegmentKernel bf16_linear_avx512bf16 = {kManyTokens, sizeof(uint16_t), lay_out, run};

}  // namespace fewbit
