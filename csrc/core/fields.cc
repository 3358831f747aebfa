// SPDX-License-Identifier: Apache-2.0
// Codes packed as fields of 1 to 7 bits, and back: eight codes, which are `bits` bytes, at a time in a word of 64 bits.
// Little-endian, as is every processor that this is built for.
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "fewbit.h"
#include "fewbit_grids.h"

namespace {

constexpr uint64_t kBytes = 0x00ff00ff00ff00ff, kPairs = 0x0000ffff0000ffff, kFours = 0x00000000ffffffff;

// Neighbours meet, two by two: bytes, then pairs of them, then fours.
inline uint64_t joined(uint64_t x, int bits) {
  x = (x & kBytes) | (x & ~kBytes) >> (8 - bits);
  x = (x & kPairs) | (x & ~kPairs) >> (16 - 2 * bits);
  return (x & kFours) | (x & ~kFours) >> (32 - 4 * bits);
}

// And part again. `ones`: a code of nothing but ones.
inline uint64_t parted(uint64_t x, int bits) {
  const uint64_t ones = (uint64_t{1} << bits) - 1, two = ones | ones << bits, four = two | two << 2 * bits;
  x = (x & four) | (x & four << 4 * bits) << (32 - 4 * bits);
  const uint64_t twos = two * 0x0000000100000001;
  x = (x & twos) | (x & twos << 2 * bits) << (16 - 2 * bits);
  const uint64_t each = ones * 0x0001000100010001;
  return (x & each) | (x & each << bits) << (8 - bits);
}

bool sound(const void* one, const void* other, int64_t rows, int64_t columns, int32_t bits) {
  return one && other && rows >= 0 && columns > 0 && bits >= 1 && bits <= 7;
}

template <int kBits>
void pack_row(const uint8_t* codes, int64_t columns, uint8_t* packed) {
  int64_t i = 0;
  if constexpr (kBits == 2 || kBits == 4) {  // whole codes in a byte, which compilers pack in vectors
    using Codes = std::conditional_t<kBits == 4, uint16_t, uint32_t>;
    constexpr int64_t kEach = sizeof(Codes);
    for (; i + kEach <= columns; i += kEach, packed++) {
      Codes some;
      memcpy(&some, codes + i, sizeof some);
      *packed = static_cast<uint8_t>(kBits == 4 ? some | some >> 4 : some | some >> 6 | some >> 12 | some >> 18);
    }
  }
  for (; i + 8 <= columns; i += 8, packed += kBits) {
    uint64_t eight;
    memcpy(&eight, codes + i, 8);
    eight = joined(eight, kBits);
    memcpy(packed, &eight, kBits);
  }
  uint64_t rest = 0;
  int width = 0;
  for (; i < columns; i++, width += kBits) rest |= uint64_t{codes[i]} << width;
  for (; width > 0; width -= 8, rest >>= 8) *packed++ = static_cast<uint8_t>(rest);
}

template <int kBits>
void unpack_row(const uint8_t* packed, int64_t columns, uint8_t* codes) {
  int64_t i = 0;
  if constexpr (kBits == 4)
    for (; i + 2 <= columns; i += 2, packed++) codes[i] = *packed & 15, codes[i + 1] = *packed >> 4;
  const uint8_t* end = packed + ((columns - i) * kBits + 7) / 8;
  for (; end - packed >= 8 && i + 8 <= columns; i += 8, packed += kBits) {
    uint64_t eight;
    memcpy(&eight, packed, 8);  // what follows is cut off
    eight = parted(eight, kBits);
    memcpy(codes + i, &eight, 8);
  }
  for (; i < columns; i += 8, packed += kBits) {
    uint64_t rest = 0;
    memcpy(&rest, packed, static_cast<size_t>(end - packed < kBits ? end - packed : kBits));
    rest = parted(rest, kBits);
    memcpy(codes + i, &rest, static_cast<size_t>(columns - i < 8 ? columns - i : 8));
  }
}

// Rows of whole bytes are one row.
template <int kBits, bool kPack>
void all_rows(const uint8_t* from, int64_t rows, int64_t columns, uint8_t* to) {
  if (columns * kBits % 8 == 0) columns *= rows, rows = 1;
  const int64_t bytes = (columns * kBits + 7) / 8;
  for (int64_t row = 0; row < rows; row++) {
    if constexpr (kPack)
      pack_row<kBits>(from + row * columns, columns, to + row * bytes);
    else
      unpack_row<kBits>(from + row * bytes, columns, to + row * columns);
  }
}

using Rows = void (*)(const uint8_t* from, int64_t rows, int64_t columns, uint8_t* to);
template <bool kPack>
constexpr Rows kRows[] = {all_rows<1, kPack>, all_rows<2, kPack>, all_rows<3, kPack>, all_rows<4, kPack>,
                          all_rows<5, kPack>, all_rows<6, kPack>, all_rows<7, kPack>};

}  // namespace

extern "C" int fewbit_pack_fields(const uint8_t* codes, int64_t rows, int64_t columns, int32_t bits, uint8_t* packed) {
  if (!sound(codes, packed, rows, columns, bits)) return FEWBIT_BAD_ARGUMENT;
  kRows<true>[bits - 1](codes, rows, columns, packed);
  return FEWBIT_OK;
}

extern "C" int fewbit_unpack_fields(const uint8_t* packed, int64_t rows, int64_t columns, int32_t bits, uint8_t* codes) {
  if (!sound(packed, codes, rows, columns, bits)) return FEWBIT_BAD_ARGUMENT;
  kRows<false>[bits - 1](packed, rows, columns, codes);
  return FEWBIT_OK;
}
