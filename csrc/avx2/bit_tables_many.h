// SPDX-License-Identifier: Apache-2.0
// Codes of 1 bit times three tokens and more, by the tables of bit_tables.h: what they are looked up by is made once for all
// tokens, and a table that is loaded serves 64 rows.
#pragma once

#include "avx2/bit_tables.h"

namespace fewbit {
namespace {

constexpr int64_t kIndexChunks = 18;  // whose indices are kept: 9 KiB
constexpr int kPairs = 2;             // of tiles that a table serves
constexpr int kLookups = 8;           // of a chunk
static_assert(kSegment / 32 <= kTableRun, "sums of 16 bits");

// Of a token: tables of all chunks, then what it was rounded to.
inline uint8_t* tables_of(const SegmentTask& task, int64_t token) {
  return static_cast<uint8_t*>(task.activations) + token * task.chunks * (kTableBytes + 32);
}

inline void tables_beside(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  SegmentTask rounded = task;
  uint8_t* tables = tables_of(task, token);
  rounded.activations = tables + task.chunks * kTableBytes - token * task.chunks * 32;
  round_token<int8_t>(rounded, x, token);
  const int8_t* row = row_of<int8_t>(rounded, token);
  for (int64_t c = 0; c < task.chunks; c++) chunk_tables(row + c * 32, tables + c * kTableBytes);
}

// Four tiles beside all tokens, a run of chunks at a time: whole segments, or a part of the only one.
struct BitRun {
  static constexpr int kTiles = kPairs * 2, kGroups = kTiles * kGroupsPerTile;

  const SegmentTask& task;
  bool long_row;
  int64_t part;                  // chunks that are summed in 16 bits
  int64_t first, chunks;         // of the row; of the run
  Segment segment;               // the first
  alignas(64) uint8_t index[kIndexChunks][kLookups][kPairs][32];
  Line line[kIndexChunks][kGroups];  // by which segments of the run are settled
  alignas(64) float totals[kRoundedTokens][kGroups][kLanes];

  explicit BitRun(const SegmentTask& all)
      : task(all), long_row(all.segment_chunks > kTableRun), part(long_row ? kTableRun : all.segment_chunks), segment(all) {}

  // Reads the run's codes, of tiles [begin, end), and what its segments are settled by.
  void read(int64_t begin, int64_t end) {
    const U half = _mm256_set1_epi8(15);
    const int64_t tile = task.chunks * 64;
    for (int r = 0; r < kPairs; r++) {
      const int64_t pair = begin + 2 * r < end ? begin + 2 * r : begin, apart = pair + 1 < end ? tile : 0;
      const uint8_t* codes = task.codes + pair * tile + first * 64;
      for (int64_t c = 0; c < chunks; c++) {
        U byte[4];
        gather_bytes(task.arranged, codes + c * 64, apart, byte);
        for (int j = 0; j < 4; j++) {
          store_lanes(index[c][2 * j][r], mask(byte[j], half));
          store_lanes(index[c][2 * j + 1][r], mask(_mm256_srli_epi16(byte[j], 4), half));
        }
      }
    }
    const int64_t segments = long_row ? 1 : (chunks + part - 1) / part;
    int64_t parameters[kTiles];  // a tile that is not there takes those of one that is
    for (int i = 0; i < kTiles; i++) parameters[i] = (begin + (begin + i < end ? i : 0)) * task.blocks * 16;
    Segment here = segment;
    for (int64_t s = 0; s < segments; s++, here.advance(task))
#pragma GCC unroll 8
      for (int t = 0; t < kGroups; t++)
        line[s][t] = Line(task, 1, parameters[t / kGroupsPerTile] + here.weight + t % kGroupsPerTile * kLanes);
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

  // Adds what the tables of a chunk bring.
  FEWBIT_INLINE void look_up(int64_t chunk, const uint8_t* tables, TableSums (&sums)[kPairs]) const {
    U low[kPairs], high[kPairs];
    for (int r = 0; r < kPairs; r++) low[r] = high[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int n = 0; n < kLookups; n++) {
      const U few = table_at(tables + n * 32), many = table_at(tables + n * 32 + 16);
      for (int r = 0; r < kPairs; r++) {
        U at = load_lanes(index[chunk][n][r]);
        asm("" : "+x"(at));  // GCC would load it twice
        low[r] = _mm256_add_epi8(low[r], _mm256_shuffle_epi8(few, at));
        high[r] = _mm256_add_epi8(high[r], _mm256_shuffle_epi8(many, at));
        asm("" : "+x"(low[r]), "+x"(high[r]));
      }
    }
    for (int r = 0; r < kPairs; r++) sums[r].add(low[r], high[r]);
  }

  template <Settling how>
  __attribute__((noinline)) void add_token(int64_t token) {
    const uint8_t* tables = tables_of(task, token) + first * kTableBytes;
    Segment here = segment;
    float(&total)[kGroups][kLanes] = totals[token];
    for (int64_t c = 0, s = 0; c < chunks; s++, here.advance(task)) {
      const int64_t end = c + part < chunks ? c + part : chunks;
      TableSums sums[kPairs];
      const F raised = broadcast(static_cast<float>((1 << 23) + (end - c) * kLookups * kRaised));
      for (; c < end; c++, tables += kTableBytes) look_up(c, tables, sums);
      const Tokens<1> tokens(task, here, token);
      for (int r = 0; r < kPairs; r++) {
        F value[4];
        sums[r].values(raised, value);
        for (int t = 0; t < 4; t++) {
          float* at = total[r * 4 + t];
          store(at, settle<how>(tokens, 0, value[t], line[s][r * 4 + t], load(at)));
        }
      }
    }
  }

  void add(Settling how, int64_t token) {
    switch (how) {
      case kPlain: return add_token<kPlain>(token);
      case kShifted: return add_token<kShifted>(token);
      case kScaled: return add_token<kScaled>(token);
      case kScaledShifted: return add_token<kScaledShifted>(token);
      case kPartly: return add_token<kPartly>(token);
    }
  }
};

// Writes what the segments of tiles [begin, end) add up to.
inline void finish_bits(const BitRun& run, int64_t begin, int64_t end, int64_t tokens) {
  const SegmentTask& task = run.task;
  const int groups = static_cast<int>(end - begin) * kGroupsPerTile;
  if (!run.long_row && end * 16 <= task.rows && task.x_blocks == 1 && task.y_dtype == FEWBIT_FLOAT32 && !task.bias) {
    float* y = static_cast<float*>(task.y) + begin * 16;
    for (int64_t m = 0; m < tokens; m++, y += task.y_stride) {
      const F scale = broadcast(task.x_scale[m]);
      for (int t = 0; t < groups; t++) store(y + t * kLanes, multiply(load(run.totals[m][t]), scale));
    }
    return;
  }
  for (int64_t token = 0; token < tokens; token++) {
    const Tokens<1> all(task, Segment(task), token);
    for (int t = 0; t < groups; t++)
      finish<1>(task, begin * 16 + t * kLanes, token, 1, [&](int) {
        const F total = load(run.totals[token][t]);
        return run.long_row ? settle(settling(task), all, 0, total, run.line[0][t], broadcast(0.0f)) : total;
      });
  }
}

// Tiles [begin, end), at most four.
inline void bits_beside(BitRun& run, int64_t begin, int64_t end, int64_t tokens) {
  const SegmentTask& task = run.task;
  const Settling how = settling(task);
  memset(run.totals, 0, static_cast<size_t>(tokens) * sizeof run.totals[0]);
  run.segment = Segment(task);
  const int64_t most = kIndexChunks / run.part * run.part;
  for (run.first = 0; run.first < task.chunks; run.first += run.chunks) {
    run.chunks = task.chunks - run.first < most ? task.chunks - run.first : most;
    run.read(begin, end);
    for (int64_t token = 0; token < tokens; token++) {
      if (token < kFetching) run.fetch(begin, token);
      run.add(run.long_row ? kPartly : how, token);
    }
    for (int64_t c = 0; !run.long_row && c < run.chunks; c += run.part) run.segment.advance(task);
  }
  finish_bits(run, begin, end, tokens);
}

inline void bits_beside_run(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  constexpr int64_t kTiles = BitRun::kTiles;
  BitRun run(task);
  for (int64_t begin = tile_begin; begin < tile_end; begin += kTiles)
    bits_beside(run, begin, begin + kTiles < tile_end ? begin + kTiles : tile_end, tokens);
}

}  // namespace
}  // namespace fewbit
