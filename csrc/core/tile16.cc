// SPDX-License-Identifier: Apache-2.0
// Bytes of tile16 and back; the layout is drawn in fewbit.h.
#include <string.h>

#include "core/parts.h"
#include "fewbit.h"

namespace {

using fewbit::part_base;
using fewbit::part_count;
using fewbit::part_shift;
using fewbit::part_vector;
using fewbit::part_width;

bool sensible(int64_t rows, int64_t columns, int32_t bits) {
  const int64_t most = int64_t{1} << 40;
  return rows > 0 && columns > 0 && bits >= 1 && bits <= 8 && rows < most / columns;
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr uint32_t each(uint32_t byte) { return 0x01010101u * byte; }

// A row of a chunk goes by groups of four columns, which stand at one place of their lane's four bytes.
template <int BITS>
struct Row {
  static void pack(const uint8_t* codes, uint32_t (*lanes)[16], int64_t r) {
    for (int g = 0; g < 8; g++) {
      uint32_t four;
      memcpy(&four, codes + 4 * g, sizeof four);
      for (int p = 0; p < part_count(BITS); p++) {
        const int width = part_width(BITS, p), base = part_base(BITS, p);
        const uint32_t field = four >> base & each((1u << width) - 1);
        lanes[base + part_vector(width, 4 * g)][r] |= field << part_shift(width, 4 * g);
      }
    }
  }

  static void unpack(const uint32_t (*lanes)[16], int64_t r, uint8_t* codes) {
    for (int g = 0; g < 8; g++) {
      uint32_t four = 0;
      for (int p = 0; p < part_count(BITS); p++) {
        const int width = part_width(BITS, p), base = part_base(BITS, p);
        const uint32_t lane = lanes[base + part_vector(width, 4 * g)][r];
        four |= (lane >> part_shift(width, 4 * g) & each((1u << width) - 1)) << base;
      }
      memcpy(codes + 4 * g, &four, sizeof four);
    }
  }
};

// Goes through chunks, tile by tile: visit(codes of its first row, its rows, its columns, its bytes).
template <class Codes, class Bytes, class Visit>
void chunks(Codes* codes, int64_t stride, int64_t rows, int64_t columns, Bytes* packed, int64_t bytes, const Visit& visit) {
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t column = 0; column < columns; column += 32, packed += bytes)
      visit(codes + row * stride + column, least(16, rows - row), least(32, columns - column), packed);
}

template <int BITS>
void pack(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, uint8_t* packed) {
  chunks(codes, stride, rows, columns, packed, BITS * 64,
         [&](const uint8_t* first, int64_t high, int64_t wide, uint8_t* bytes) {
           uint32_t lanes[8][16] = {};
           for (int64_t r = 0; r < high; r++) {
             uint8_t ragged[32] = {};
             if (wide < 32) memcpy(ragged, first + r * stride, static_cast<size_t>(wide));
             Row<BITS>::pack(wide < 32 ? ragged : first + r * stride, lanes, r);
           }
           memcpy(bytes, lanes, BITS * 64);
         });
}

template <int BITS>
void unpack(const uint8_t* packed, int64_t rows, int64_t columns, uint8_t* codes, int64_t stride) {
  chunks(codes, stride, rows, columns, packed, BITS * 64,
         [&](uint8_t* first, int64_t high, int64_t wide, const uint8_t* bytes) {
           uint32_t lanes[8][16];
           memcpy(lanes, bytes, BITS * 64);
           for (int64_t r = 0; r < high; r++) {
             uint8_t row[32];
             Row<BITS>::unpack(lanes, r, row);
             memcpy(first + r * stride, row, static_cast<size_t>(wide));
           }
         });
}

// Eight bytes at the same place of a chunk's three vectors, from tile16 to halves16 or back.
template <bool back>
void exchange(const uint64_t (&from)[3], uint64_t (&to)[3]) {
  // `width` bits of each byte, from bit `tile` of vector `t` to bit `half` of vector `h`.
  const auto move = [&](int t, int tile, int h, int half, int width) {
    const uint64_t field = (back ? from[h] >> half : from[t] >> tile) & 0x0101010101010101u * ((1u << width) - 1);
    (back ? to[t] : to[h]) |= field << (back ? tile : half);
  };
#pragma GCC unroll 8
  for (int g = 0; g < 6; g++) {
    const int v = g / 2, h = g % 2;
    move(g / 4, g % 4 * 2, v, h * 4, 2);
    move(2, g, v, h * 4 + 2, 1);
    v < 2 ? move(1, 4 + h * 2 + v, v, h * 4 + 3, 1) : move(2, 6 + h, v, h * 4 + 3, 1);
  }
}

template <bool back>
void exchange_chunk(uint8_t* chunk) {
  for (int at = 0; at < 64; at += 8) {
    uint64_t from[3], to[3] = {};
    for (int v = 0; v < 3; v++) memcpy(&from[v], chunk + v * 64 + at, 8);
    exchange<back>(from, to);
    for (int v = 0; v < 3; v++) memcpy(chunk + v * 64 + at, &to[v], 8);
  }
}

// The bytes of a chunk of 1 bit, from tile16 to bytes16 or back.
template <bool back>
void sort_bytes(uint8_t* chunk) {
  uint8_t from[64];
  memcpy(from, chunk, sizeof from);
  for (int r = 0; r < 16; r++) {
    const int place = r / 4 == 1 ? r + 4 : r / 4 == 2 ? r - 4 : r;
    for (int j = 0; j < 4; j++) {
      const int tile = r * 4 + j, sorted = j * 16 + place;
      chunk[back ? tile : sorted] = from[back ? sorted : tile];
    }
  }
}

}  // namespace

extern "C" int64_t fewbit_tile16_bytes(int64_t rows, int64_t columns, int32_t bits) {
  if (!sensible(rows, columns, bits)) return -1;
  return (rows + 15) / 16 * ((columns + 31) / 32) * bits * 64;
}

extern "C" int fewbit_tile16_pack(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, int32_t bits,
                                  uint8_t* packed) {
  static void (*const kPack[])(const uint8_t*, int64_t, int64_t, int64_t, uint8_t*) = {
      pack<1>, pack<2>, pack<3>, pack<4>, pack<5>, pack<6>, pack<7>, pack<8>};
  if (!sensible(rows, columns, bits) || !codes || !packed) return FEWBIT_BAD_ARGUMENT;
  kPack[bits - 1](codes, stride, rows, columns, packed);
  return FEWBIT_OK;
}

extern "C" int fewbit_tile16_unpack(const uint8_t* packed, int64_t rows, int64_t columns, int32_t bits, uint8_t* codes,
                                    int64_t stride) {
  static void (*const kUnpack[])(const uint8_t*, int64_t, int64_t, uint8_t*, int64_t) = {
      unpack<1>, unpack<2>, unpack<3>, unpack<4>, unpack<5>, unpack<6>, unpack<7>, unpack<8>};
  if (!sensible(rows, columns, bits) || !codes || !packed) return FEWBIT_BAD_ARGUMENT;
  kUnpack[bits - 1](packed, rows, columns, codes, stride);
  return FEWBIT_OK;
}

extern "C" int fewbit_arrange(int64_t rows, int64_t columns, int32_t bits, int32_t back, uint8_t* packed) {
  static void (*const kArrange[2][2])(uint8_t*) = {{sort_bytes<false>, sort_bytes<true>},
                                                   {exchange_chunk<false>, exchange_chunk<true>}};
  if (!sensible(rows, columns, bits) || (bits != 1 && bits != 3) || !packed) return FEWBIT_BAD_ARGUMENT;
  const auto arrange = kArrange[bits / 2][back != 0];
  const uint8_t* end = packed + fewbit_tile16_bytes(rows, columns, bits);
  for (; packed < end; packed += bits * 64) arrange(packed);
  return FEWBIT_OK;
}
