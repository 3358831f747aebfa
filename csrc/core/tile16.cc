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

}  // namespace

extern "C" int64_t fewbit_tile16_bytes(int64_t rows, int64_t columns, int32_t bits) {
  if (!sensible(rows, columns, bits)) return -1;
  return (rows + 15) / 16 * ((columns + 31) / 32) * bits * 64;
}

extern "C" int fewbit_tile16_pack(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, int32_t bits,
                                  uint8_t* packed) {
  if (!sensible(rows, columns, bits) || !codes || !packed) return FEWBIT_BAD_ARGUMENT;
  const int64_t chunks = (columns + 31) / 32;
  for (int64_t row0 = 0; row0 < rows; row0 += 16) {
    for (int64_t chunk = 0; chunk < chunks; chunk++, packed += bits * 64) {
      uint32_t lanes[8][16] = {};
      const int64_t here = least(32, columns - chunk * 32);
      for (int64_t r = 0; r < least(16, rows - row0); r++) {
        const uint8_t* row = codes + (row0 + r) * stride + chunk * 32;
        for (int p = 0; p < part_count(bits); p++) {
          const int width = part_width(bits, p), base = part_base(bits, p);
          for (int64_t k = 0; k < here; k++) {
            const uint32_t field = (row[k] >> base) & ((1u << width) - 1);
            const int at = static_cast<int>(k);
            lanes[base + part_vector(width, at)][r] |= field << part_shift(width, at);
          }
        }
      }
      memcpy(packed, lanes, static_cast<size_t>(bits) * 64);
    }
  }
  return FEWBIT_OK;
}

extern "C" int fewbit_tile16_unpack(const uint8_t* packed, int64_t rows, int64_t columns, int32_t bits, uint8_t* codes,
                                    int64_t stride) {
  if (!sensible(rows, columns, bits) || !codes || !packed) return FEWBIT_BAD_ARGUMENT;
  const int64_t chunks = (columns + 31) / 32;
  for (int64_t row0 = 0; row0 < rows; row0 += 16) {
    for (int64_t chunk = 0; chunk < chunks; chunk++, packed += bits * 64) {
      uint32_t lanes[8][16];
      memcpy(lanes, packed, static_cast<size_t>(bits) * 64);
      const int64_t here = least(32, columns - chunk * 32);
      for (int64_t r = 0; r < least(16, rows - row0); r++) {
        uint8_t* row = codes + (row0 + r) * stride + chunk * 32;
        for (int64_t k = 0; k < here; k++) {
          uint32_t code = 0;
          for (int p = 0; p < part_count(bits); p++) {
            const int width = part_width(bits, p), base = part_base(bits, p);
            const int at = static_cast<int>(k);
            code |= (lanes[base + part_vector(width, at)][r] >> part_shift(width, at) & ((1u << width) - 1)) << base;
          }
          row[k] = static_cast<uint8_t>(code);
        }
      }
    }
  }
  return FEWBIT_OK;
}
