// SPDX-License-Identifier: Apache-2.0
// Codes of one bit times one token rounded to int8, by looking sums up (T-MAC, Wei et al. 2024): four neighbouring bits
// of a byte choose one of the 16 sums that four activations can make. A lane's four bytes hold other columns each, so a
// register holds four such tables, of which byte j of every lane looks its sums up in table j: 256 products a lookup.
//
// Sums of four int8 lie within [-512, 508]. They are kept exactly, 512 added, as a low and a high byte: low bytes are
// summed in int32 at once; high ones, at most 3, in bytes until the end of the segment, where 8 chunks of 2 lookups
// have made at most 48. What a segment comes to is the integer that Codes<1> has in it, so the results are its bits.
#include "avx512vnni/dot.h"

#include "core/int8.h"
#include "core/rounding.h"

namespace fewbit {
namespace {

constexpr int kStreams = 2;        // row groups beside one another
constexpr int64_t kTables = 256;   // bytes of a chunk: for its low and its high 16 columns, low and high bytes of sums
constexpr int32_t kRaised = 512;   // what a sum is raised by, to be no less than 0
constexpr int64_t kPerColumn = kTables / 32;

// The tables of 16 activations; column 4 * b + j of them is bit b of an index into table j.
inline void tabulate(const int8_t* x, uint8_t* out) {
  alignas(64) static constexpr struct Bits {
    uint8_t byte[64] = {};
    constexpr Bits() {
      for (int i = 0; i < 64; i++) byte[i] = i / 4 >> i % 4 & 1;
    }
  } kBits;
  const __m128i transposed = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)),
                                              _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  int32_t four[4];
  memcpy(four, &transposed, sizeof four);
  const U bits = _mm512_load_si512(&kBits), raised = _mm512_set1_epi32(kRaised);
  for (int j = 0; j < 4; j++) {
    const U sums = multiply_add(raised, bits, _mm512_set1_epi32(four[j]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * 16), _mm512_cvtepi32_epi8(sums));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64 + j * 16), _mm512_cvtepi32_epi8(_mm512_srli_epi32(sums, 8)));
  }
}

// Rounds a token into the end of its own place, then tabulates it from the beginning: what has been rounded is read
// before its memory is written.
void prepare(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  auto* tables = static_cast<uint8_t*>(task.activations) + token * task.chunks * kTables;
  auto* rounded = reinterpret_cast<int8_t*>(tables) + task.chunks * (kTables - 32);
  SegmentTask whole = task;
  whole.activations = rounded - token * task.chunks * 32;
  round_token<int8_t>(whole, x, token);
  for (int64_t chunk = 0; chunk < task.chunks; chunk++, tables += kTables) {
    int8_t here[32];
    memcpy(here, rounded + chunk * 32, 32);
    tabulate(here, tables);
    tabulate(here + 16, tables + 128);
  }
}

// Two chains a row group, one for each half of a chunk, hide the latency.
template <int T>
struct Sums {
  U low[T][2], high[T][2];

  FEWBIT_INLINE Sums() {
    for (int t = 0; t < T; t++)
      for (int half = 0; half < 2; half++) low[t][half] = high[t][half] = _mm512_setzero_si512();
  }

  // One chunk of every row group.
  FEWBIT_INLINE void add(const uint8_t* const (&codes)[T], const uint8_t* tables, int64_t ahead) {
    const U nibble = _mm512_set1_epi8(15), table = _mm512_set1_epi32(0x30201000);
    const U ones = _mm512_set1_epi8(1);
    U sums[4];
    for (int i = 0; i < 4; i++) sums[i] = load_lanes(tables + i * 64);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      U bits = load_lanes(codes[t]);
      if (ahead) prefetch<1>(codes[t] + ahead);
      keep(bits);
      for (int half = 0; half < 2; half++) {
        constexpr int kMasked = 0xea;  // bits & nibble | table
        const U index = _mm512_ternarylogic_epi32(half ? shift_right(bits, 4) : bits, nibble, table, kMasked);
        low[t][half] = multiply_add(low[t][half], _mm512_permutexvar_epi8(index, sums[half * 2]), ones);
        high[t][half] = _mm512_add_epi8(high[t][half], _mm512_permutexvar_epi8(index, sums[half * 2 + 1]));
      }
    }
  }

  // The sum of the activations whose bit is 1, of `chunks` chunks.
  FEWBIT_INLINE Dot<1> total(int t, int64_t chunks) const {
    const U ones = _mm512_set1_epi8(1), upper = _mm512_add_epi8(high[t][0], high[t][1]);
    const U over = multiply_add(_mm512_setzero_si512(), upper, ones);
    const U raised = _mm512_set1_epi32(static_cast<int32_t>(chunks) * 8 * kRaised);
    Dot<1> dot;
    const U lower = _mm512_add_epi32(low[t][0], low[t][1]);
    dot.sum = _mm512_sub_epi32(_mm512_add_epi32(lower, shift_left(over, 8)), raised);
    return dot;
  }
};

void strip(const SegmentTask& task, const SegmentStrip& rows) {
  constexpr int T = kStreams;
  const Codes<1> kernel(task);
  const int64_t ahead = next_strip(task, T);
  const auto* tables = static_cast<const uint8_t*>(task.activations) + rows.token * task.chunks * kTables;
  const uint8_t* codes[T];
  F total[T];
  for (int t = 0; t < T; t++) {
    codes[t] = Group(task, rows.at(t)).codes;
    total[t] = broadcast(0.0f);
  }
  for (int64_t s = 0; s < task.segments; s++) {
    const int64_t left = task.chunks - s * task.segment_chunks;
    const int64_t chunks = left < task.segment_chunks ? left : task.segment_chunks;
    Sums<T> sums;
    for (int64_t c = 0; c < chunks; c++, tables += kTables) {
      sums.add(codes, tables, ahead);
      for (int t = 0; t < T; t++) codes[t] += 64;
    }
    const Segment segment(task, s);
    for (int t = 0; t < T; t++) {
      const Line line(task, Group(task, rows.at(t)).parameters + segment.weight);
      const Dot<1> dot[1] = {sums.total(t, chunks)};
      total[t] = settle(task, kernel, segment, dot, line, rows.token, total[t]);
    }
  }
  for (int t = 0; t < T && t < rows.groups; t++) finish(task, Group(task, rows.at(t)).row, rows.token, total[t]);
}

void run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  for (int64_t token = 0; token < tokens; token++)
    for (int64_t group = tile_begin; group < tile_end; group += kStreams)
      strip(task, {group, tile_end - group, token, tokens});
}

}  // namespace

const SegmentKernel planes_linear_avx512vbmi = {1, kPerColumn, prepare, run};

}  // namespace fewbit
