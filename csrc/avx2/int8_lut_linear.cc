// SPDX-License-Identifier: Apache-2.0
// Of one or two tokens, levels of a byte are multiplied by activations as bytes above the least level; pairs of activations that
// int16 has no room for then are halved, and the other halves multiplied by themselves. Where many are, levels keep their signs.
#include "avx2/dot.h"
#include "avx2/halves.h"
#include "avx2/rests.h"

#include "core/int8_lut.h"

namespace fewbit {
namespace {

constexpr int kMostByte = 127;

// Levels of -127 .. 127 as they are, times activations: the magnitudes of these, times the levels with their signs. Of an
// activation, -128 is one that has a magnitude of 8 bits, of a level it would have none. Pairs of products take 16 bits.
struct SignedBytes {
  static constexpr int kGroups = 8, kOrigin = 0;
  static constexpr int64_t kChunks = kEndless;
  U wide = _mm256_setzero_si256();

  inline void add(U u, const int8_t* x) {
    add_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(four(x)), _mm256_sign_epi8(u, four(x))));
  }
  inline void add_pairs(U pairs) {
    wide = _mm256_add_epi32(wide, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    asm("" : "+x"(wide));
  }
  inline void begin(F start) { wide = _mm256_add_epi32(wide, _mm256_cvtps_epi32(start)); }
  inline void flush() {}
  inline F value() const { return _mm256_cvtepi32_ps(wide); }
};

// The same plus 127, times activations of which those of one sign in a pair add up to 128 at most.
struct RaisedBytes : SignedBytes {
  static constexpr int kOrigin = kMostByte;
  static_assert(2 * kMostByte * 128 <= 32767);

  inline void add(U u, const int8_t* x) { add_pairs(_mm256_maddubs_epi16(u, four(x))); }
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

// Four columns of a token that are multiplied once more.
struct Rest {
  int32_t group, segment;
  int8_t x[4];
};

// Those of a token, in order, less than kMost of `groups` groups; none of a token that was left whole.
struct RestList {
  static constexpr int64_t kWords = 3, kMost = 12;  // int32s of a chunk; one of as many groups
  int32_t count, whole;
  Rest rest[];

  static inline RestList& of(const SegmentTask& task, int64_t token) {
    return *reinterpret_cast<RestList*>(task.rests + token * task.chunks * kWords);
  }
};

// Those of M tokens.
template <int M>
struct RestsOfTokens {
  const SegmentTask& task;
  const Rest *next[M], *end[M];

  explicit FEWBIT_INLINE RestsOfTokens(const SegmentTask& whole) : task(whole) {
    for (int m = 0; m < M; m++) {
      const RestList& list = RestList::of(task, m);
      next[m] = list.rest, end[m] = list.rest + list.count;
    }
  }

  // Values are integers that float32 holds.
  template <class K, int T>
  FEWBIT_APART void add(const K& kernel, const SegmentStrip& strip, int64_t first, int64_t last,
                        F (&value)[kUnsettled][T][M]) {
    const uint8_t* codes[T];
    for (int t = 0; t < T; t++) codes[t] = Group(task, strip.at(t)).codes;
    for (int m = 0; m < M; m++)
      for (; next[m] < end[m] && next[m]->segment < last; next[m]++) {
        const int64_t group = next[m]->group;
        F(&here)[T][M] = value[next[m]->segment - first];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
          typename K::Sum dot;
          dot.add(kernel.at(codes[t] + group / 8 * K::kBits * 64, static_cast<int>(group % 8)), next[m]->x);
          here[t][m] = fewbit::add(here[t][m], dot.value());
        }
      }
  }
};

// Levels plus those of Sum::kOrigin, beside one or two tokens.
template <int BITS, class SUM>
struct Lut {
  static constexpr int kBits = BITS, kPlanes = 1, kFields = 1, kBegins = SUM::kOrigin == 0 ? -1 : 0;
  static constexpr float origin = -SUM::kOrigin;
  using X = int8_t;
  using Sum = SUM;
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
void strips_of(const SegmentTask& task, int64_t begin, int64_t end, int64_t tokens) {
  const auto by = [&](auto* kernel) {
    using Kernel = std::remove_pointer_t<decltype(kernel)>;
    if (task.together == 1) return strips_settled<Kernel, Kernel::kBits <= 4 ? 4 : 2, 1>(task, begin, end, tokens);
    strips_settled<Kernel, kDirect2, 2>(task, begin, end, tokens);
  };
  if (RestList::of(task, 0).whole || RestList::of(task, task.together - 1).whole) return by(static_cast<K<SignedBytes>*>(nullptr));
  by(static_cast<K<RaisedBytes>*>(nullptr));
}

template <class SUM> using Lut1 = Lut<1, SUM>;
template <class SUM> using Lut3 = Lut<3, SUM>;
template <class SUM> using Lut4 = Lut<4, SUM>;
template <class SUM> using Lut5 = Lut<5, SUM>;
template <class SUM> using Lut6 = Lut<6, SUM>;

void few_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * kGroupsPerTile, end = tile_end * kGroupsPerTile;
  if (task.arranged) return strips_of<LutHalves>(task, begin, end, tokens);
  switch (task.bits) {
    case 1: return strips_of<Lut1>(task, begin, end, tokens);
    case 2: return strips_of<Lut2>(task, begin, end, tokens);
    case 3: return strips_of<Lut3>(task, begin, end, tokens);
    case 4: return strips_of<Lut4>(task, begin, end, tokens);
    case 5: return strips_of<Lut5>(task, begin, end, tokens);
    case 6: return strips_of<Lut6>(task, begin, end, tokens);
  }
}

// Halves the large pairs of a rounded token and lists the other halves; unless those would take more than signs do, or codes
// have 4 bits, which are read from memory as soon with signs.
void list_halves(const SegmentTask& task, int64_t token) {
  int8_t* const row = row_of<int8_t>(task, token);
  RestList& list = RestList::of(task, token);
  const auto chunk = [&](int64_t c) { return reinterpret_cast<uint8_t*>(row + c * task.together * 32); };
  const auto groups = [](U large) { return ~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(large, repeat(0)))) & 255; };
  int64_t count = 0;
  for (int64_t c = 0; c < task.chunks; c++) count += __builtin_popcount(groups(large_pairs(load_lanes(chunk(c)))));
  list.count = 0, list.whole = task.bits == 4 || count * RestList::kMost > task.chunks * 8;
  for (int64_t c = 0; c < task.chunks && !list.whole; c++) {
    const U here = load_lanes(chunk(c)), large = large_pairs(here), half = mask(half_of(here), large);
    int8_t halves[32];
    store_lanes(reinterpret_cast<uint8_t*>(halves), half);
    store_lanes(chunk(c), _mm256_sub_epi8(here, half));
    for (int left = groups(large); left; left &= left - 1) {
      Rest& rest = list.rest[list.count++];
      const int g = __builtin_ctz(left);
      rest.group = static_cast<int32_t>(c * 8 + g), rest.segment = static_cast<int32_t>(c / task.segment_chunks);
      memcpy(rest.x, halves + g * 4, sizeof rest.x);
    }
  }
}

void round_halved(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  round_token<int8_t>(task, x, token);
  list_halves(task, token);
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
