// SPDX-License-Identifier: Apache-2.0
// Of one token, levels are multiplied by activations as bytes above -128: as int8_lut_linear.cc does, but what a pair is too
// large by is multiplied column by column. A row at a time is a stream by itself, as its activations take no registers.
#include "avx2/rests.h"
#include "avx2/signed.h"

#include "core/byte_cells.h"

namespace fewbit {
namespace {

constexpr int kHalves = -3;  // in the place of 3 bits that lie in rowhalves16

// See avx2/halves.h: what stands beside a code, in bits 3 to 6, does not count where levels are looked up.
template <>
struct ByteCells<kHalves> {
  static constexpr int kUnit = 3, kFields = 8, kColumns = 16 * kFields;
  U pair[4];

  ByteCells() = default;
  explicit FEWBIT_INLINE ByteCells(const uint8_t* codes) {
    pair[3] = repeat(0);
    for (int p = 0; p < kUnit; p++) {
      const U all = load_lanes(codes + p * kPart);
      pair[3] = _mm256_avg_epu8(mask(all, 0x88888888u), pair[3]);
      pair[p] = mask(all, 0x77777777u);
    }
  }

  FEWBIT_INLINE U field(int n) const { return n % 2 ? shift_right(pair[n / 2], 4) : pair[n / 2]; }
};

}  // namespace
}  // namespace fewbit

#include "core/int8_row_lut.h"

namespace fewbit {
namespace {

constexpr int kRaisedBy = 128;
constexpr int64_t kFarAhead = 2048;  // bytes: the processor's own fetching comes too late for so short a loop

// What sixteen columns are to be multiplied by once more: `x` in every other byte, beside 0. Each one's code lies in byte `code` of
// a row, in its upper half where `upper` is set; of several codes in a half it is that for which `other` has no bit 7. With
// `next`, it is a bit each of three bytes so far apart.
struct Sixteen {
  static constexpr int kCount = 16;
  int32_t code[kCount], next[kCount];
  uint8_t x[32], upper[32], other[4][32];
};

// Those of the only token, at most one for kMost columns; none where it was left whole.
struct RestList {
  static constexpr int64_t kWords = 21, kMost = 64;  // int32s of 32 columns
  int32_t count, whole;
  Sixteen of[];

  static inline RestList& of_task(const Int8RowTask& task) { return *reinterpret_cast<RestList*>(task.rests); }
};
static_assert(sizeof(RestList) + sizeof(Sixteen) <= 4 * RestList::kWords * 4, "room in the shortest row, of 128 columns");

// Adds column `at` of the n-th vector of activations, which is to be multiplied by x.
template <int BITS>
inline void add_rest(const Int8RowTask& task, RestList& list, int64_t n, int64_t at, int32_t x) {
  using Cells = ByteCells<BITS>;
  const int64_t chunk = n / Cells::kFields * kBeside + at / 16, field = n % Cells::kFields;
  const bool last = BITS == kHalves && field >= 6;
  const int64_t bit = last ? field % 2 * 4 : field * (BITS == kHalves ? 4 : BITS);
  const int64_t left = task.chunks - chunk / kRowChunks * kRowChunks, apart = left < kRowChunks ? left * 16 : kPart;
  const int64_t code = chunk / kRowChunks * Cells::kUnit * kPart + bit / 8 * apart + chunk % kRowChunks * 16 + at % 16;
  const int i = list.count % Sixteen::kCount;
  Sixteen& here = list.of[list.count++ / Sixteen::kCount];
  if (i == 0) {
    memset(&here, 0, sizeof here);
    memset(here.other, 0x80, sizeof here.other);
  }
  here.code[i] = static_cast<int32_t>(code), here.next[i] = static_cast<int32_t>(last ? apart : 0);
  here.x[2 * i] = static_cast<uint8_t>(x), here.upper[2 * i] = bit % 8 < 4 ? 0 : 0xff;
  here.other[BITS == kHalves ? 0 : bit % 4 / BITS][2 * i] = 0;
}

// Takes from large pairs what they are too large by.
template <int BITS>
void list_rests(const Int8RowTask& task) {
  auto* const x = static_cast<int8_t*>(task.activations);
  RestList& list = RestList::of_task(task);
  const auto large = [&](int64_t n) {
    const U pairs = large_pairs(load_lanes(reinterpret_cast<const uint8_t*>(x + n * kBytes)));
    return static_cast<uint32_t>(_mm256_movemask_epi8(pairs)) & 0x55555555u;
  };
  int64_t count = 0;
  for (int64_t n = 0; n < task.padded / kBytes; n++) count += __builtin_popcount(large(n));
  list.count = 0, list.whole = count * RestList::kMost > task.padded;
  for (int64_t n = 0; n < task.padded / kBytes && !list.whole; n++)
    for (uint32_t left = large(n); left; left &= left - 1) {
      const int64_t first = __builtin_ctz(left);
      int8_t* const pair = x + n * kBytes + first;
      const int32_t sum = pair[0] + pair[1], more = sum < 0 ? sum + 128 : sum - 128;
      const int second = sum < 0 ? pair[1] < pair[0] : pair[1] > pair[0];  // the larger one
      pair[second] = static_cast<int8_t>(pair[second] - more);
      add_rest<BITS>(task, list, n, first + second, more);
    }
}

void prepare(const Int8RowTask& task, const fewbit_input& x, int64_t token) {
  int8_row_prepare(task, x, token);
  if (task.together > 1) return;
  switch (task.halves ? kHalves : task.bits) {
    case kHalves: return list_rests<kHalves>(task);
    case 1: return list_rests<1>(task);
    case 2: return list_rests<2>(task);
    case 4: return list_rests<4>(task);
  }
}

// A row's levels, looked up by codes of two chunks, field by field: by half a byte, in which one of several may be meant.
template <int BITS>
struct RaisedLevels {
  static constexpr int kTables = BITS == kHalves ? 1 : 4 / BITS;
  U table[kTables];

  RaisedLevels() = default;
  explicit FEWBIT_INLINE RaisedLevels(const uint8_t* bytes) {
    const U levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    for (int i = 0; i < kTables; i++) {
      const U at = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                    13, 14, 15);
      table[i] = BITS == kHalves ? levels
                                 : _mm256_shuffle_epi8(levels, mask(_mm256_srli_epi16(at, i * BITS), 0x01010101u * ((1u << (BITS & 7)) - 1)));
    }
  }

  FEWBIT_INLINE void field(const ByteCells<BITS>& cells, int n, U& index, U& u) const {
    if constexpr (BITS == kHalves) index = cells.field(n);
    else if (n % kTables == 0) index = mask(shift_right(cells.part[0], n / kTables * 4), 0x0f0f0f0fu);
    u = _mm256_shuffle_epi8(table[n % kTables], index);
  }

  // The products of sixteen columns with a row, of the bytes that hold their codes.
  FEWBIT_INLINE U rest(const Sixteen& here, const uint16_t* bytes) const {
    const U all = load_lanes(reinterpret_cast<const uint8_t*>(bytes));
    const U index = _mm256_blendv_epi8(mask(all, 0x0f0f0f0fu), _mm256_srli_epi16(all, 4), load_lanes(here.upper));
    U u = repeat(0);
    for (int i = 0; i < kTables; i++)
      u = combine(u, _mm256_shuffle_epi8(table[i], combine(index, load_lanes(here.other[i]))));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, load_lanes(here.x)), _mm256_set1_epi16(1));
  }
};

// The bytes of R rows, `apart`, that hold the codes of sixteen columns. All are stored before any is loaded as a vector, which
// waits for them.
template <int BITS, int R>
FEWBIT_INLINE void rest_bytes(const Sixteen& here, const uint8_t* codes, int64_t apart, uint16_t (&bytes)[R][Sixteen::kCount]) {
  for (int i = 0; i < Sixteen::kCount; i++) {
    const uint8_t* at = codes + here.code[i];
    const int32_t next = here.next[i];
    if (BITS == kHalves && next) {
      for (int r = 0; r < R; r++, at += apart)
        bytes[r][i] = static_cast<uint16_t>((at[0] & 0x88) >> 3 | (at[next] & 0x88) >> 2 | (at[2 * next] & 0x88) >> 1);
    } else {
      for (int r = 0; r < R; r++, at += apart) bytes[r][i] = at[0];
    }
  }
}

// Adds the products of four chunks of a row, two sums that fields take in turn.
template <int BITS>
FEWBIT_INLINE void add_four(const RaisedLevels<BITS>& levels, const uint8_t* codes, const uint8_t* x, U (&sum)[2]) {
  using Cells = ByteCells<BITS>;
#pragma GCC unroll 2
  for (int at = 0; at < kPart; at += kBytes) {
    const Cells cells(codes + at);
    U index, u;
#pragma GCC unroll 8
    for (int n = 0; n < Cells::kFields; n++, x += kBytes) {
      levels.field(cells, n, index, u);
      const U pairs = _mm256_maddubs_epi16(u, load_lanes(x));
      sum[n % 2] = _mm256_add_epi32(sum[n % 2], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
}

// The products of a row, as a vector.
template <int BITS>
FEWBIT_INLINE U raised_row(const Int8RowTask& task, const uint8_t* codes, const RaisedLevels<BITS>& levels) {
  using Cells = ByteCells<BITS>;
  constexpr int64_t kFour = Cells::kUnit * kPart, kColumns = kRowChunks * Cells::kColumns;  // bytes of four chunks
  const int64_t apart = task.chunks * Cells::kUnit * 16, whole = apart / kFour, rest = apart % kFour;
  const auto* x = static_cast<const uint8_t*>(task.activations);
  U sum[2] = {repeat(0), repeat(0)};
  for (int64_t i = 0; i < whole; i++) {
#pragma GCC unroll 4
    for (int64_t line = 0; line < kFour; line += 64) __builtin_prefetch(codes + kFarAhead + i * kFour + line, 0, 3);
    add_four<BITS>(levels, codes + i * kFour, x + i * kColumns, sum);
  }
  if (rest) add_four<BITS>(levels, LastChunks<BITS, 1>(codes + whole * kFour, apart, rest).bytes, x + whole * kColumns, sum);
  return _mm256_add_epi32(sum[0], sum[1]);
}

// One row after the other, as each is a stream, but ended together.
template <int BITS, int R>
void ended_rows(const Int8RowTask& task, int64_t row) {
  const int64_t apart = task.chunks * ByteCells<BITS>::kUnit * 16;
  const uint8_t* codes = task.codes + row * apart;
  RaisedLevels<BITS> levels[R];
  U all[4] = {repeat(0), repeat(0), repeat(0), repeat(0)};
  for (int r = 0; r < R; r++) {
    levels[r] = RaisedLevels<BITS>(task.levels + (row + r) / task.table_rows * 16);
    all[r] = raised_row<BITS>(task, codes + r * apart, levels[r]);
  }
  const RestList& list = RestList::of_task(task);
  for (int32_t left = list.count, i = 0; left > 0; left -= Sixteen::kCount, i++) {
    alignas(32) uint16_t bytes[R][Sixteen::kCount];
    rest_bytes<BITS, R>(list.of[i], codes, apart, bytes);
    for (int r = 0; r < R; r++) all[r] = _mm256_add_epi32(all[r], levels[r].rest(list.of[i], bytes[r]));
  }
  int32_t totals[4];
  totals_of(all, totals);
  for (int r = 0; r < R; r++) totals[r] -= kRaisedBy * task.sums[0];
  put_rows<R>(task, row, 0, totals);
}

template <int BITS>
void raised_rows(const Int8RowTask& task, int64_t row, int64_t end) {
  for (; row + 4 <= end; row += 4) ended_rows<BITS, 4>(task, row);
  for (; row < end; row++) ended_rows<BITS, 1>(task, row);
}

void run(const Int8RowTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const int64_t begin = tile_begin * 16, end = tile_end * 16 < task.rows ? tile_end * 16 : task.rows;
  if (task.together == 1 && (task.bits != 3 || task.halves) && !RestList::of_task(task).whole) {
    switch (task.halves ? kHalves : task.bits) {
      case kHalves: return raised_rows<kHalves>(task, begin, end);
      case 1: return raised_rows<1>(task, begin, end);
      case 2: return raised_rows<2>(task, begin, end);
      case 4: return raised_rows<4>(task, begin, end);
    }
  }
  if (task.halves) return int8_rows<kHalves>(task, begin, end, tokens);
  int8_row_run(task, tile_begin, tile_end, tokens);
}

}  // namespace

const Int8RowKernel int8_row_lut_linear_avx2 = {prepare, run, RestList::kWords};

}  // namespace fewbit
