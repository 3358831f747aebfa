// SPDX-License-Identifier: Apache-2.0
// Keys and values into the layout drawn in steps.h, and from float16 into codes and back. Included after a simd.h.
#pragma once

#include <math.h>

#include "decode/elements.h"

namespace fewbit {
namespace {

// `count` floats as elements of an open block; their type is that of `out`.
FEWBIT_INLINE void narrow(int32_t, const float* x, int64_t count, float* out) {
  memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
}

FEWBIT_INLINE void narrow(int32_t kv, const float* x, int64_t count, uint16_t* out) {
  if (kv == FEWBIT_BFLOAT16) {
    for (int64_t d = 0; d < count; d++) out[d] = to_bfloat16(x[d]);
    return;
  }
  const float most = 65504.0f;  // an infinity would be NaN times the weight 0 of a position that is not seen
  float clamped[kMostHeadDim];
  for (int64_t d = 0; d < count; d++) clamped[d] = x[d] > most ? most : x[d] < -most ? -most : x[d];
  for (int64_t d = 0; d < count; d++) out[d] = to_float16(clamped[d]);
}

template <class T>
FEWBIT_INLINE void append_as(const HeadLayout& layout, uint8_t* head, int64_t position, const float* key,
                             const float* value) {
  T narrowed[kMostHeadDim];
  const int64_t at = position % kTile;
  T* keys = reinterpret_cast<T*>(head + position / kTile * layout.key_tile) + at;
  uint8_t* values = head + layout.values + position / kTile * layout.value_tile;
  narrow(layout.kv, key, layout.dim, narrowed);
  for (int64_t d = 0; d < layout.dim; d++) keys[d * kTile] = narrowed[d];
  narrow(layout.kv, value, layout.dim, reinterpret_cast<T*>(values) + at * layout.width);
}

void append(const HeadLayout& layout, uint8_t* head, int64_t position, const float* key, const float* value) {
  if (layout.kv == FEWBIT_FLOAT32) append_as<float>(layout, head, position, key, value);
  else append_as<uint16_t>(layout, head, position, key, value);
}

// Where element d of position p is, in either half of a head: element index and, for 4 bits, whether the high half.
FEWBIT_INLINE int64_t index_of(const HeadLayout& layout, bool value, int64_t p, int64_t d, bool* high) {
  const bool short_codes = layout.kv == FEWBIT_KV_INT4;
  if (value) {
    *high = short_codes && d % 32 >= 16;
    return p % kTile * layout.width / (short_codes ? int64_t{2} : int64_t{1}) + (short_codes ? d / 32 * 16 + d % 16 : d);
  }
  *high = short_codes && d % 2;
  return (short_codes ? d / 2 : d) * kTile + p % kTile;
}

FEWBIT_INLINE uint8_t* tile_of(const HeadLayout& layout, bool value, uint8_t* head, int64_t p) {
  return value ? head + layout.values + p / kTile * layout.value_tile : head + p / kTile * layout.key_tile;
}

FEWBIT_INLINE float element(int32_t dtype, const uint8_t* tile, int64_t index) {
  if (dtype == FEWBIT_FLOAT32) return reinterpret_cast<const float*>(tile)[index];
  const uint16_t half = reinterpret_cast<const uint16_t*>(tile)[index];
  return dtype == FEWBIT_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

// Codes of one position's keys or values: scale = float16(max|x| / most), code = round(x / scale), most = 127 or 7.
void close_position(const HeadLayout& open, uint8_t* from, const HeadLayout& closed, uint8_t* to, bool value,
                    int64_t p) {
  const float most = closed.kv == FEWBIT_KV_INT8 ? 127.0f : 7.0f;
  bool high;
  float largest = 0.0f;
  const uint8_t* tile = tile_of(open, value, from, p);
  for (int64_t d = 0; d < open.dim; d++) {
    const float x = fabsf(element(open.kv, tile, index_of(open, value, p, d, &high)));
    largest = x > largest ? x : largest;
  }
  const float least = 5.9604644775390625e-08f, wanted = largest / most;
  const uint16_t scale = to_float16(wanted < least ? least : wanted);
  reinterpret_cast<uint16_t*>(to + closed.scales)[(value ? kBlock : int64_t{0}) + p] = scale;
  uint8_t* codes = tile_of(closed, value, to, p);
  for (int64_t d = 0; d < open.dim; d++) {
    const float x = element(open.kv, tile, index_of(open, value, p, d, &high)) / from_float16(scale);
    const float clamped = x > most ? most : x < -most ? -most : x;
    const int32_t code = static_cast<int32_t>(nearbyintf(clamped));
    const int64_t at = index_of(closed, value, p, d, &high);
    if (closed.kv == FEWBIT_KV_INT8) codes[at] = static_cast<uint8_t>(code + 128);
    else codes[at] = static_cast<uint8_t>(codes[at] | static_cast<uint8_t>(code + 8) << (high ? 4 : 0));
  }
}

void close_block(const HeadLayout& open, const uint8_t* from, const HeadLayout& closed, uint8_t* to) {
  memset(to, 0, static_cast<size_t>(closed.bytes));
  for (int64_t p = 0; p < kBlock; p++)
    for (int value = 0; value < 2; value++) close_position(open, const_cast<uint8_t*>(from), closed, to, value, p);
}

void reopen_block(const HeadLayout& closed, const uint8_t* from, const HeadLayout& open, uint8_t* to) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(from + closed.scales);
  for (int64_t p = 0; p < kBlock; p++)
    for (int value = 0; value < 2; value++) {
      const uint8_t* codes = tile_of(closed, value, const_cast<uint8_t*>(from), p);
      uint8_t* tile = tile_of(open, value, to, p);
      const float scale = from_float16(scales[(value ? kBlock : int64_t{0}) + p]);
      for (int64_t d = 0; d < open.dim; d++) {
        bool high;
        const uint8_t byte = codes[index_of(closed, value, p, d, &high)];
        const int32_t code = closed.kv == FEWBIT_KV_INT8 ? byte - 128 : ((byte >> (high ? 4 : 0)) & 15) - 8;
        const float x = static_cast<float>(code) * scale;
        narrow(open.kv, &x, 1, reinterpret_cast<uint16_t*>(tile) + index_of(open, value, p, d, &high));
      }
    }
}

}  // namespace
}  // namespace fewbit
