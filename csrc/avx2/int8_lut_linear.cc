// SPDX-License-Identifier: Apache-2.0
// Of one or two tokens, levels of a byte are multiplied by activations as bytes above the least level; pairs of activations that
// int16 has no room for then are halved, and the other halves multiplied by themselves. Where many are, levels keep their signs.
#include "avx2/halved.h"
#include "avx2/halves.h"

#include "core/int8_lut.h"

namespace fewbit {
namespace {

constexpr int kMostByte = 127;

// Levels of -127 .. 127 as they are, times activations: the magnitudes of these, times the levels with their signs. Of an
// activation, -128 is one that has a magnitude of 8 bits, of a level it would have none.
struct SignedBytes : PairsOfBytes {
  inline void add(U u, const int8_t* x) {
    add_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(four(x)), _mm256_sign_epi8(u, four(x))));
  }
};

// The same plus 127.
struct RaisedBytes : PairsOfBytes {
  static constexpr int kOrigin = kMostByte;
};

// Codes of 2 bits: two are half a byte, by which the level of either is looked up, so that one mask serves both.
struct Halves {
  Held<2> held;
  U index;

  static constexpr int group(int n) { return n; }
  FEWBIT_INLINE void advance(const uint8_t* codes, int n) { held.advance(codes, n); }
  template <class K>
  FEWBIT_INLINE void read(const K& kernel, int n, U (&plane)[1]) {
    if (n % 2 == 0) index = mask(shifted(held.part[0], n % 4 * 2), 0x0f0f0f0fu);
    plane[0] = kernel.level[n % 2](index);
  }
};

// Codes of 3 bits in halves16: what stands beside a code does not count.
struct Thirds {
  Held<3, true> held;

  static constexpr int group(int n) { return n; }
  FEWBIT_INLINE void advance(const uint8_t* codes, int n) { held.advance(codes, n); }
  template <class K>
  FEWBIT_INLINE void read(const K& kernel, int n, U (&plane)[1]) {
    plane[0] = kernel.table(held.index(n));
  }
};

// Levels plus those of Sum::kOrigin, beside one or two tokens.
template <int BITS, class SUM>
struct Lut {
  static constexpr int kBits = BITS, kPlanes = 1, kFields = 1, kBegins = SUM::kOrigin == 0 ? -1 : 0;
  static constexpr float origin = -SUM::kOrigin;
  using X = int8_t;
  using Sum = SUM;
  using RestSum = SUM;
  template <int M>
  using Rests = RestsOfTokens<M>;
  ByteTable<BITS> table;
  float step;

  explicit FEWBIT_INLINE Lut(const SegmentTask& task) : table(*task.table, SUM::kOrigin, 0), step(task.table->step) {}

  FEWBIT_INLINE void split(U codes, U (&plane)[1]) const { plane[0] = table(codes); }
  FEWBIT_INLINE U at(const uint8_t* codes, int g) const { return table(quad_at<BITS>(codes, g)); }
  FEWBIT_INLINE F value(const Sum (&dot)[1]) const { return dot[0].value(); }
};

template <class SUM>
struct Lut2 : Lut<2, SUM> {
  using Reader = Halves;
  Shuffle level[2];

  explicit FEWBIT_INLINE Lut2(const SegmentTask& task) : Lut<2, SUM>(task) {
    for (int i = 0; i < 2; i++) {
      uint8_t bytes[16];
      for (int j = 0; j < 16; j++) bytes[j] = static_cast<uint8_t>(task.table->level[j >> 2 * i & 3] + SUM::kOrigin);
      level[i] = Shuffle(bytes);
    }
  }
};

template <class SUM>
struct LutHalves : Lut<3, SUM> {
  static constexpr bool kHalves = true;
  using Reader = Thirds;
  using Lut<3, SUM>::Lut;

  FEWBIT_INLINE U at(const uint8_t* codes, int g) const { return this->table(quad_at<3, true>(codes, g)); }
};

template <template <class> class K>
void strips_of(const SegmentTask& task, int64_t tile, int64_t tokens) {
  const auto by = [&](auto* kernel) {
    using Kernel = std::remove_pointer_t<decltype(kernel)>;
    if (task.together == 1) return strips_settled<Kernel, Kernel::kBits <= 4 ? 4 : 2, 1>(task, tile, tokens);
    strips_settled<Kernel, kDirect2, 2>(task, tile, tokens);
  };
  if (any_whole(task)) return by(static_cast<K<SignedBytes>*>(nullptr));
  by(static_cast<K<RaisedBytes>*>(nullptr));
}

template <class SUM> using Lut1 = Lut<1, SUM>;
template <class SUM> using Lut3 = Lut<3, SUM>;
template <class SUM> using Lut4 = Lut<4, SUM>;
template <class SUM> using Lut5 = Lut<5, SUM>;
template <class SUM> using Lut6 = Lut<6, SUM>;

void few_run(const SegmentTask& task, int64_t tile_begin, int64_t, int64_t tokens) {
  if (task.arranged) return strips_of<LutHalves>(task, tile_begin, tokens);
  switch (task.bits) {
    case 1: return strips_of<Lut1>(task, tile_begin, tokens);
    case 2: return strips_of<Lut2>(task, tile_begin, tokens);
    case 3: return strips_of<Lut3>(task, tile_begin, tokens);
    case 4: return strips_of<Lut4>(task, tile_begin, tokens);
    case 5: return strips_of<Lut5>(task, tile_begin, tokens);
    case 6: return strips_of<Lut6>(task, tile_begin, tokens);
  }
}

void round_halved(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  list_halves(task, token, task.bits != 4);  // 4 bits are read from memory as soon with signs
}

// By the above, which takes all levels that these take.
template <int BITS>
constexpr bool kFewElsewhere<LutBytes<BITS>> = true;
template <>
constexpr bool kFewElsewhere<InHalves<LutBytes<3>>> = true;
static_assert(kMostByte >= kMostLevel);

template <template <int> class K>
void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  if (task.arranged) return int8_strips<InHalves<K<3>>>(task, tile_begin, tile_end, tokens);
  int8_lut_run<K>(task, tile_begin, tile_end, tokens);
}

}  // namespace

const LutKernels int8_lut_linear_avx2 = {
    kMostLevel,
    {kManyTokens, 1, 1, round_begun, run<LutBytes>, kMostStarts},
    {kManyTokens, sizeof(Words::X), 1, round_token<Words::X>, run<LutWords>}};

const FewKernel int8_few_lut_linear_avx2 = {kMostByte, {kManyTokens, 1, 1, round_halved, few_run, 0, RestList::kWords}};

}  // namespace fewbit
