// SPDX-License-Identifier: Apache-2.0
// Of one token, levels are multiplied by activations as bytes above -128: as int8_lut_linear.cc does, but what a pair is too
// large by is multiplied column by column. A row at a time is a stream by itself, as its activations take no registers.
#include "avx2/rests.h"
#include "avx2/signed.h"

#include "core/int8_row_lut.h"

namespace fewbit {
namespace {

constexpr int kRaisedBy = 128;
constexpr int64_t kFarAhead = 2048;  // bytes: the processor's own fetching comes too late for so short a loop

// What a column is to be multiplied by once more: bits of bytes `code` and `code + next` of a row, from bit `shift`.
struct Rest {
  int32_t code, next, shift, x;
};

// Those of the only token, at most one for kMost columns; none where it was left whole.
struct RestList {
  static constexpr int64_t kWords = 3, kMost = 64;  // int32s of 32 columns
  int32_t count, whole;
  Rest rest[];

  static inline RestList& of(const Int8RowTask& task) { return *reinterpret_cast<RestList*>(task.rests); }
};

// What column `at` of the n-th vector of activations is to be multiplied by.
template <int BITS>
inline Rest rest_of(const Int8RowTask& task, int64_t n, int64_t at, int32_t x) {
  using Cells = ByteCells<BITS>;
  const int64_t chunk = n / Cells::kFields * kBeside + at / 16, bit = n % Cells::kFields * BITS;
  const int64_t left = task.chunks - chunk / kRowChunks * kRowChunks, apart = left < kRowChunks ? left * 16 : kPart;
  const int64_t code = chunk / kRowChunks * Cells::kUnit * kPart + bit / 8 * apart + chunk % kRowChunks * 16 + at % 16;
  const bool two = bit % 8 + BITS > 8;
  return {static_cast<int32_t>(code), static_cast<int32_t>(two ? apart : 0), static_cast<int32_t>(bit % 8), x};
}

// Takes from large pairs what they are too large by.
template <int BITS>
void list_rests(const Int8RowTask& task) {
  auto* const x = static_cast<int8_t*>(task.activations);
  RestList& list = RestList::of(task);
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
      list.rest[list.count++] = rest_of<BITS>(task, n, first + second, more);
    }
}

void prepare(const Int8RowTask& task, const fewbit_input& x, int64_t token) {
  int8_row_prepare(task, x, token);
  if (task.together > 1) return;
  switch (task.bits) {
    case 1: return list_rests<1>(task);
    case 2: return list_rests<2>(task);
    case 3: return list_rests<3>(task);
    case 4: return list_rests<4>(task);
  }
}

template <int BITS>
FEWBIT_INLINE int32_t rest_product(const Rest& here, const uint8_t* codes, const uint8_t* level) {
  uint32_t code = codes[here.code];
  if constexpr (BITS == 3) code |= static_cast<uint32_t>(codes[here.code + here.next]) << 8;
  return here.x * level[code >> here.shift & ((1u << BITS) - 1)];
}

// A row's levels, looked up by codes of two chunks, field by field: by half a byte, in which one of several may be meant.
template <int BITS>
struct RaisedLevels {
  static constexpr int kTables = BITS == 3 ? 1 : 4 / BITS;
  U table[kTables];

  explicit FEWBIT_INLINE RaisedLevels(const uint8_t* bytes) {
    for (int i = 0; i < kTables; i++) {
      const U at = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                    13, 14, 15);
      const U levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
      table[i] = _mm256_shuffle_epi8(levels, mask(_mm256_srli_epi16(at, i * BITS), 0x01010101u * ((1u << BITS) - 1)));
    }
  }

  FEWBIT_INLINE void field(const ByteCells<BITS>& cells, int n, U& index, U& u) const {
    if constexpr (BITS == 3) index = cells.field(n);
    else if (n % kTables == 0) index = mask(shift_right(cells.part[0], n / kTables * 4), 0x0f0f0f0fu);
    u = _mm256_shuffle_epi8(table[n % kTables], index);
  }
};

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
FEWBIT_INLINE U raised_row(const Int8RowTask& task, const uint8_t* codes, const uint8_t* table) {
  using Cells = ByteCells<BITS>;
  constexpr int64_t kFour = Cells::kUnit * kPart, kColumns = kRowChunks * Cells::kColumns;  // bytes of four chunks
  const int64_t apart = task.chunks * Cells::kUnit * 16, whole = apart / kFour, rest = apart % kFour;
  const auto* x = static_cast<const uint8_t*>(task.activations);
  const RaisedLevels<BITS> levels(table);
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
  const uint8_t *codes = task.codes + row * apart, *table[R];
  U all[4] = {repeat(0), repeat(0), repeat(0), repeat(0)};
  for (int r = 0; r < R; r++) {
    table[r] = task.levels + (row + r) / task.table_rows * 16;
    all[r] = raised_row<BITS>(task, codes + r * apart, table[r]);
  }
  int32_t totals[4];
  totals_of(all, totals);
  for (int r = 0; r < R; r++) totals[r] -= kRaisedBy * task.sums[0];
  const RestList& list = RestList::of(task);
  for (int32_t i = 0; i < list.count; i++) {
    const Rest here = list.rest[i];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) totals[r] += rest_product<BITS>(here, codes + r * apart, table[r]);
  }
  put_rows<R>(task, row, 0, totals);
}

template <int BITS>
void raised_rows(const Int8RowTask& task, int64_t row, int64_t end) {
  for (; row + 4 <= end; row += 4) ended_rows<BITS, 4>(task, row);
  for (; row < end; row++) ended_rows<BITS, 1>(task, row);
}

void run(const Int8RowTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  if (task.together > 1 || RestList::of(task).whole) return int8_row_run(task, tile_begin, tile_end, tokens);
  const int64_t begin = tile_begin * 16, end = tile_end * 16 < task.rows ? tile_end * 16 : task.rows;
  switch (task.bits) {
    case 1: return raised_rows<1>(task, begin, end);
    case 2: return raised_rows<2>(task, begin, end);
    case 3: return raised_rows<3>(task, begin, end);
    case 4: return raised_rows<4>(task, begin, end);
  }
}

}  // namespace

const Int8RowKernel int8_row_lut_linear_avx2 = {prepare, run, RestList::kWords};

}  // namespace fewbit
