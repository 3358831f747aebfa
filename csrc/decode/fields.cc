// SPDX-License-Identifier: Apache-2.0
// Codes of a file, eight at a time: they are `bits` bytes.
#include <string.h>

#include "core/inline.h"
#include "core/products.h"
#include "decode/weights.h"

namespace fewbit {
namespace {

// `count` codes, 8 at most, from `bytes` bytes.
FEWBIT_INLINE void unpack(const uint8_t* packed, int64_t bytes, int32_t bits, int64_t count, uint8_t* codes) {
  uint64_t word = 0;  // little-endian, whatever the machine is
  for (int64_t i = 0; i < bytes; i++) word |= static_cast<uint64_t>(packed[i]) << (8 * i);
  for (int64_t i = 0; i < count; i++) codes[i] = static_cast<uint8_t>(word >> (bits * i) & ((1u << bits) - 1));
}

template <int BITS>
void unpack_row(const uint8_t* packed, int64_t columns, uint8_t* codes) {
  int64_t column = 0;
  for (; column + 8 <= columns; column += 8) unpack(packed + column / 8 * BITS, BITS, BITS, 8, codes + column);
  const int64_t left = columns - column;
  if (left) unpack(packed + column / 8 * BITS, ceil_div(left * BITS, 8), BITS, left, codes + column);
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_fields_unpack(const uint8_t* packed, int64_t rows, int64_t columns, int32_t bits, uint8_t* codes,
                                    int32_t threads) {
  using namespace fewbit;
  static void (*const kRows[])(const uint8_t*, int64_t, uint8_t*) = {
      unpack_row<1>, unpack_row<2>, unpack_row<3>, unpack_row<4>,
      unpack_row<5>, unpack_row<6>, unpack_row<7>, unpack_row<8>};
  if (!packed || !codes || rows < 1 || columns < 1 || bits < 1 || bits > 8 || threads < 1) return FEWBIT_BAD_ARGUMENT;
  const int64_t width = ceil_div(columns * bits, 8);
  spread(rows, thread_count(threads),
         [&](int64_t row) { kRows[bits - 1](packed + row * width, columns, codes + row * columns); });
  return FEWBIT_OK;
}
