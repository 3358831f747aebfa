// SPDX-License-Identifier: Apache-2.0
// Few tokens look products up; beside many, levels are looked up once for all of them, and a product is rounded by what it is
// added to: bits of the sum are an integer.
#include "avx2/level_bytes.h"
#include "avx2/product_tables.h"

namespace fewbit {
namespace {

constexpr int kTokens24 = 2;  // computed together where there are many

void scaled(const SegmentTask& task, const fewbit_input& x, int64_t token) {
  float* out = row_of<float>(task, token);
  const int64_t apart = task.together * 32;
  products_of(task, x, token, Levels24(task),
              [&](int64_t chunk, const float* here) { memcpy(out + chunk * apart, here, 32 * sizeof *here); });
}

// Writes levels of eight rows: (groups of four columns, rows r and r + 4 for r = 0 .. 3, four columns of each).
template <int BITS>
FEWBIT_INLINE void decode_levels(const LevelBytes& level, const uint8_t* codes, int64_t chunks, float* out) {
  for (; chunks > 0; chunks--, codes += BITS * 64) {
    Held<BITS> held;
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++, out += 32) {
      held.advance(codes, g);
      F four[4];
      level(held.quad(g), four);
      for (int r = 0; r < 4; r++) store(out + r * 8, four[r]);
    }
  }
}

// What eight rows and each of the tokens add up to over columns [0, 32 chunks). A call of its own, for the registers.
FEWBIT_APART void add_products(const float* levels, const float* x, int64_t chunks, U (&sum)[kTokens24]) {
  U part[kTokens24][4];  // of rows r and r + 4, and every fourth column
  for (auto& token : part)
    for (U& rows : token) rows = repeat(static_cast<uint32_t>(chunks) * -8u * static_cast<uint32_t>(kRoundBits));
  for (; chunks > 0; chunks--, x += kTokens24 * 32)
#pragma GCC unroll 2
    for (int g = 0; g < 8; g++, levels += 32)
#pragma GCC unroll 2
      for (int m = 0; m < kTokens24; m++) {
        const F four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + m * 32 + g * 4));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
          const F product = fma(load(levels + r * 8), four, broadcast(kRound));
          part[m][r] = _mm256_add_epi32(part[m][r], _mm256_castps_si256(product));
        }
      }
  for (int m = 0; m < kTokens24; m++)
    sum[m] = _mm256_hadd_epi32(_mm256_hadd_epi32(part[m][0], part[m][1]), _mm256_hadd_epi32(part[m][2], part[m][3]));
}

// A row group of all tokens.
template <int BITS>
void rows_many(const SegmentTask& task, const LevelBytes& level, int64_t group, int64_t tokens) {
  constexpr int M = kTokens24;
  alignas(32) float levels[kSegment * kLanes];
  F total[kRoundedTokens];
  const Group rows(task, group);
  const auto* x = static_cast<const float*>(task.activations);
  for (int64_t m = 0; m < (tokens + M - 1) / M * M; m++) total[m] = broadcast(0.0f);
  int64_t chunk = 0;
  for (Segment segment(task); segment.index < task.segments; segment.advance(task)) {
    const int64_t left = task.chunks - chunk, chunks = left < task.segment_chunks ? left : task.segment_chunks;
    const Line line(task, 1, rows.parameters + segment.weight);
    decode_levels<BITS>(level, rows.codes + chunk * BITS * 64, chunks, levels);
    for (int64_t token = 0; token < tokens; token += M) {
      U sum[M];
      add_products(levels, x + (token * task.chunks + chunk * M) * 32, chunks, sum);
      const Tokens<M> here(task, segment, token);
      for (int m = 0; m < M; m++) total[token + m] = settle(settling(task), here, m, convert(sum[m]), line, total[token + m]);
    }
    chunk += chunks;
  }
  for (int64_t token = 0; token < tokens; token += M)
    finish<M>(task, rows.row, token, tokens - token, [&](int m) { return total[token + m]; });
}

template <int BITS>
void strips_many(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  const LevelBytes level(Levels24(task).level);
  for (int64_t group = tile_begin * kGroupsPerTile; group < tile_end * kGroupsPerTile; group++)
    rows_many<BITS>(task, level, group, tokens);
}

void run_many(const SegmentTask& task, int64_t tile_begin, int64_t tile_end, int64_t tokens) {
  task.bits == 3 ? strips_many<3>(task, tile_begin, tile_end, tokens) : strips_many<4>(task, tile_begin, tile_end, tokens);
}

}  // namespace

const SegmentKernel int24_lut_linear_avx2 = {kTokens24, sizeof(float), 1, scaled, run_many};

const FewKernel int24_few_lut_linear_avx2 = {2, {1, kEntries, 1, tables_of_products, product_tables_run}};

}  // namespace fewbit
