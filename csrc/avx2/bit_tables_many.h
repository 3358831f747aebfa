// SPDX-License-Identifier: Apache-2.0
// Codes of 1 bit times three tokens and more, by the tables of four_tables.h: what they are looked up by is made once for all
// tokens, and a table that is loaded serves 64 rows.
#pragma once

#include "avx2/four_tables.h"

namespace fewbit {
namespace {

constexpr int64_t kIndexChunks = 18;  // whose indices are kept: 9 KiB
constexpr int kPairs = 2;             // of tiles that a table serves

// What the sums of parts of a row hold modulo 2^16: words of two rows, the even one plus 2^8 of the odd one, and odd rows alone.
struct RowSums {
  U both = _mm256_setzero_si256(), odd = _mm256_setzero_si256();

  FEWBIT_INLINE void add(U bytes) {
    both = _mm256_add_epi16(both, bytes);
    odd = _mm256_add_epi16(odd, _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x100)));
    asm("" : "+x"(both), "+x"(odd));  // GCC would delay the additions, and keep what it looked up in memory
  }
  FEWBIT_INLINE U even() const { return _mm256_sub_epi16(both, _mm256_slli_epi16(odd, 8)); }
};

// Two tiles, `apart`, as bytes of the same columns: vector j holds byte j of each lane, rows of the first tile in the lower
// bytes of words, rows of the second in the upper ones.
FEWBIT_INLINE void gather_words(bool arranged, const uint8_t* codes, int64_t apart, U (&byte)[4]) {
  if (arranged) {
    for (int j = 0; j < 4; j += 2) {
      const U first = load_lanes(codes + j * 16), second = load_lanes(codes + apart + j * 16);
      const U low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
      byte[j] = lower_halves(low, high), byte[j + 1] = upper_halves(low, high);
    }
    return;
  }
  U words[2][2];  // of each row group: bytes 0 and 1, bytes 2 and 3
  for (int t = 0; t < 2; t++) {
    const U first = by_place(load_lanes(codes + t * 32)), second = by_place(load_lanes(codes + apart + t * 32));
    words[t][0] = _mm256_unpacklo_epi8(first, second), words[t][1] = _mm256_unpackhi_epi8(first, second);
  }
  for (int i = 0; i < 2; i++) {
    byte[2 * i] = _mm256_unpacklo_epi64(words[0][i], words[1][i]);
    byte[2 * i + 1] = _mm256_unpackhi_epi64(words[0][i], words[1][i]);
  }
}

// Four tiles beside all tokens, a run of chunks at a time: whole segments, or a part of the only one.
struct BitRun {
  static constexpr int kTiles = kPairs * 2, kGroups = kTiles * kGroupsPerTile;

  const SegmentTask& task;
  int64_t part;           // chunks that are summed in 16 bits
  int64_t first, chunks;  // of the row; of the run
  int64_t before, parts;  // of the row before the run; of the run
  int32_t zero;           // of all tokens
  float* y;               // where totals of the first row go at the end of the tiles, if they need no more than scales
  Segment segment;        // the first
  alignas(64) uint8_t index[kIndexChunks][kFours][kPairs][32];
  Line line[kIndexChunks][kGroups];  // by which segments of the run are settled
  U apart[kIndexChunks][kPairs][2];  // zero - 128 for each bit of a part, as sums: where zero is not 128
  U sums[kIndexChunks][kPairs][2];   // of a token: of even rows of each pair of tiles, and of odd ones
  alignas(64) float totals[kRoundedTokens][kGroups][kLanes];

  explicit BitRun(const SegmentTask& all) : task(all), part(part_of(all)), zero(FourTables(all, 0).all().zero), segment(all) {}

  // Reads the run's codes, of tiles [begin, end), and what its segments are settled by.
  void read(int64_t begin, int64_t end) {
    const U half = _mm256_set1_epi8(15);
    const int64_t tile = task.chunks * 64;
    for (int r = 0; r < kPairs; r++) {
      const int64_t pair = begin + 2 * r < end ? begin + 2 * r : begin, apart = pair + 1 < end ? tile : 0;
      const uint8_t* codes = task.codes + pair * tile + first * 64;
      for (int64_t c = 0; c < chunks; c++) {
        U byte[4];
        gather_words(task.arranged, codes + c * 64, apart, byte);
        for (int j = 0; j < 4; j++) {
          store_lanes(index[c][j][r], mask(byte[j], half));
          store_lanes(index[c][j + 4][r], mask(_mm256_srli_epi16(byte[j], 4), half));
        }
      }
    }
    if (zero != 128) count_bits();
    const int64_t segments = long_row(task) ? 1 : parts;
    int64_t parameters[kTiles];  // a tile that is not there takes those of one that is
    for (int i = 0; i < kTiles; i++) parameters[i] = (begin + (begin + i < end ? i : 0)) * task.blocks * 16;
    Segment here = segment;
    for (int64_t s = 0; s < segments; s++, here.advance(task))
#pragma GCC unroll 8
      for (int t = 0; t < kGroups; t++)
        line[s][t] = Line(task, 1, parameters[t / kGroupsPerTile] + here.weight + t % kGroupsPerTile * kLanes);
  }

  void count_bits() {
    const U bits = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const U each = _mm256_set1_epi16(static_cast<int16_t>(zero - 128));
    for (int64_t c = 0, p = 0; c < chunks; p++) {
      RowSums rows[kPairs];
      for (const int64_t end = c + part < chunks ? c + part : chunks; c < end; c++)
        for (int n = 0; n < kFours; n++)
          for (int r = 0; r < kPairs; r++) rows[r].add(_mm256_shuffle_epi8(bits, load_lanes(index[c][n][r])));
      for (int r = 0; r < kPairs; r++) {
        apart[p][r][0] = _mm256_mullo_epi16(rows[r].even(), each);
        apart[p][r][1] = _mm256_mullo_epi16(rows[r].odd, each);
      }
    }
  }

  // Fetches a share of what the next tiles are read from.
  FEWBIT_INLINE void fetch(int64_t begin, int64_t share) const {
    const int64_t next = begin + kTiles, lines = task.blocks * kTiles * 16;
    const uint8_t* codes = task.codes + next * task.chunks * 64;
    for (int64_t i = first * kTiles + share; i < (first + chunks) * kTiles; i += kFetching)
      __builtin_prefetch(codes + i * 64, 0, 2);
    if (first > 0) return;
    const auto parameters = [&](const void* values, bool half) {
      const int64_t bytes = half ? 2 : 4;
      const uint8_t* at = static_cast<const uint8_t*>(values) + next * task.blocks * 16 * bytes;
      for (int64_t i = share * 64; i < lines * bytes; i += kFetching * 64) __builtin_prefetch(at + i, 0, 2);
    };
    parameters(task.scale, task.scale_half);
    if (task.offset) parameters(task.offset, task.offset_half);
  }

  // Sums of chunks [chunk, end), which are a part.
  template <bool PAIRED>
  FEWBIT_INLINE void add_part(const uint8_t* tables, int64_t chunk, int64_t end, U (&to)[kPairs][2]) const {
    RowSums rows[kPairs];
    const uint8_t* at = index[chunk][0][0];
    for (; chunk < end; chunk++, at += sizeof index[0], tables += FourTables::kTables)
#pragma GCC unroll 4
      for (int n = 0; n < kFours; n += 2) {
        const U four = table_at(tables + n * 16), next = table_at(tables + n * 16 + 16);
#pragma GCC unroll 2
        for (int r = 0; r < kPairs; r++) {
          const uint8_t* by = at + (n * kPairs + r) * 32;
          const U one = _mm256_shuffle_epi8(four, load_lanes(by)), other = _mm256_shuffle_epi8(next, load_lanes(by + kPairs * 32));
          if constexpr (PAIRED) {
            rows[r].add(_mm256_add_epi8(one, other));
          } else {
            rows[r].add(one);
            rows[r].add(other);
          }
        }
      }
    for (int r = 0; r < kPairs; r++) to[r][0] = rows[r].even(), to[r][1] = rows[r].odd;
  }

  // Sums of the run's parts, of fours that are not left out.
  template <bool PAIRED>
  FEWBIT_INLINE void add_parts(const uint8_t* tables) {
    for (int64_t c = 0, p = 0; c < chunks; c += part, p++)
      add_part<PAIRED>(tables + c * FourTables::kTables, c, c + part < chunks ? c + part : chunks, sums[p]);
  }

  // Of distances from the zero: makes them sums of codes less 128, and 2^15.
  FEWBIT_INLINE void add_apart(const PartOfToken* of) {
    for (int64_t p = 0; p < parts; p++) {
      const U words = _mm256_set1_epi16(static_cast<int16_t>(of[p].words));
      for (int r = 0; r < kPairs; r++)
        for (int i = 0; i < 2; i++) sums[p][r][i] = _mm256_add_epi16(sums[p][r][i], _mm256_add_epi16(apart[p][r][i], words));
    }
  }

  // Adds what is left out of them.
  FEWBIT_INLINE void add_left(const LeftFour* left) {
    const int64_t begin = first * kFours, end = begin + chunks * kFours;
    const int64_t inverse = (int64_t{1} << 32) / (part * kFours) + 1;  // of fours a part, of which a run has few
    while (left->four < begin) left++;
    for (; left->four < end; left++) {
      const int64_t at = left->four - begin;
      U(&to)[kPairs][2] = sums[at * inverse >> 32];
      add_four(table_at(left->low), 0, at, to);
      if (__builtin_expect(left->high != 0, 0)) add_four(left->table_of_high(), 8, at, to);
    }
  }

  // Adds 2^shift times what a table has for four `at` of the run.
  FEWBIT_INLINE void add_four(U table, int shift, int64_t at, U (&to)[kPairs][2]) const {
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; r++) {
      const U found = _mm256_shuffle_epi8(table, load_lanes(index[at / kFours][at % kFours][r]));
      const U even = mask(found, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(found, 8);
      to[r][0] = _mm256_add_epi16(to[r][0], _mm256_slli_epi16(even, shift));
      to[r][1] = _mm256_add_epi16(to[r][1], _mm256_slli_epi16(odd, shift));
    }
  }

  // Adds the sums of a token's parts to its totals, as floats: 2^23 above what they are put behind.
  template <Settling how>
  FEWBIT_APART void settle_token(int64_t token) {
    const U above = _mm256_set1_epi16(0x4b00);
    const FourTables from(task, token);
    Segment here = segment;
    float(&totals_of)[kGroups][kLanes] = totals[token];
    F total[kGroups];
#pragma GCC unroll 8
    for (int t = 0; t < kGroups; t++) total[t] = first == 0 ? broadcast(0.0f) : load(totals_of[t]);
    const PartOfToken* of = &from.part(before);
#pragma GCC unroll 1
    for (int64_t p = 0; p < parts; p++, here.advance(task)) {
      const Tokens<1> tokens(task, here, token);
      const F less = broadcast(static_cast<float>(1 << 23) + of[p].less);
#pragma GCC unroll 4
      for (int i = 0; i < kGroups; i += 2) {
        const U words = sums[p][i / 4][i / 2 % 2];
        const F value[2] = {_mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(words, above)), less),
                            _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(words, above)), less)};
#pragma GCC unroll 2
        for (int t = 0; t < 2; t++)
          total[i + t] = settle<how>(tokens, 0, value[t], line[how == kPartly ? 0 : p][i + t], total[i + t]);
      }
    }
    const F scale = broadcast(y ? task.x_scale[token] : 1.0f);
    float* to = y ? y + token * task.y_stride : totals_of[0];
#pragma GCC unroll 8
    for (int t = 0; t < kGroups; t++) store(to + t * kLanes, y ? multiply(total[t], scale) : total[t]);
  }

  FEWBIT_APART void add(Settling how, int64_t token) {
    const FourTables from(task, token);
    if (from.all().paired) add_parts<true>(from.chunk(first));
    else add_parts<false>(from.chunk(first));
    if (zero != 128) add_apart(&from.part(before));
    add_left(from.left());
    switch (how) {
      case kPlain: return settle_token<kPlain>(token);
      case kShifted: return settle_token<kShifted>(token);
      case kScaled: return settle_token<kScaled>(token);
      case kScaledShifted: return settle_token<kScaledShifted>(token);
      case kPartly: return settle_token<kPartly>(token);
    }
  }
};

// Tiles [begin, end), at most four.
inline void bits_beside(BitRun& run, int64_t begin, int64_t end, int64_t tokens) {
  const SegmentTask& task = run.task;
  const Settling how = settling(task);
  const bool plain = !long_row(task) && task.x_blocks == 1 && task.y_dtype == FEWBIT_FLOAT32 && !task.bias;
  const bool whole = end - begin == BitRun::kTiles && end * 16 <= task.rows;
  run.segment = Segment(task);
  run.before = 0;
  const int64_t most = kIndexChunks / run.part * run.part;
  for (run.first = 0; run.first < task.chunks; run.first += run.chunks, run.before += run.parts) {
    run.chunks = task.chunks - run.first < most ? task.chunks - run.first : most;
    run.parts = (run.chunks + run.part - 1) / run.part;
    const bool last = run.first + run.chunks == task.chunks;
    run.y = last && plain && whole ? static_cast<float*>(task.y) + begin * 16 : nullptr;
    run.read(begin, end);
    for (int64_t token = 0; token < tokens; token++) {
      if (token < kFetching) run.fetch(begin, token);
      run.add(long_row(task) ? kPartly : how, token);
    }
    for (int64_t c = 0; !long_row(task) && c < run.chunks; c += run.part) run.segment.advance(task);
  }
  const Strip rows = {begin * kGroupsPerTile, (end - begin) * kGroupsPerTile, 0, tokens};
  if (!run.y) finish_totals<1>(task, rows, long_row(task) ? kPartly : how, run.line[0], run.totals);
}

inline void bits_beside_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  constexpr int64_t kTiles = BitRun::kTiles;
  BitRun run(task);
  for (int64_t begin = tile_begin; begin < tile_end; begin += kTiles)
    bits_beside(run, begin, begin + kTiles < tile_end ? begin + kTiles : tile_end, tokens);
}

}  // namespace
}  // namespace fewbit
