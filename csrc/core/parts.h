// SPDX-License-Identifier: Apache-2.0
// How a b-bit code of tile16 is split into parts (see fewbit.h). No function but constexpr ones, in an unnamed
// namespace: every file under every instruction set has its own.
#pragma once

namespace fewbit {
namespace {

// Width of part p of a code of `bits` bits, 0 past the last: the binary digits of `bits`, from the largest.
constexpr int part_width(int bits, int p) {
  for (int w = 8; w > 0; w /= 2) {
    if (!(bits & w)) continue;
    if (p-- == 0) return w;
  }
  return 0;
}

// Lowest bit of the code that part p holds; it is also the first vector of the part within the chunk.
constexpr int part_base(int bits, int p) {
  int base = 0;
  for (int q = 0; q < p; q++) base += part_width(bits, q);
  return base;
}

constexpr int part_count(int bits) {
  int count = 0;
  while (part_width(bits, count)) count++;
  return count;
}

// Where a part of `width` bits holds column k of the chunk: which of its vectors, and the lowest bit within the lane.
// Four neighbouring columns stand at the same place of a lane's four bytes.
constexpr int part_vector(int width, int k) { return k / 4 * width / 8; }
constexpr int part_shift(int width, int k) { return k % 4 * 8 + k / 4 * width % 8; }

// The column that stands at bits [position * width, + width) of vector v: the inverse of both.
constexpr int part_column(int width, int v, int position) {
  const int fields = 8 / width;
  return 4 * (v * fields + position % fields) + position / fields;
}

}  // namespace
}  // namespace fewbit
