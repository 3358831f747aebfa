// SPDX-License-Identifier: Apache-2.0
// How fast this machine reads memory: what the speed of a kernel is a share of.
#include <string.h>

#include <atomic>

#include "core/pool.h"
#include "fewbit.h"

namespace {

constexpr int64_t kUnit = 1 << 18;

struct Stream {
  const uint8_t* data;
  int64_t bytes;
  std::atomic<uint64_t> result{0};
};

void read_unit(void* context, int64_t unit) {
  Stream& stream = *static_cast<Stream*>(context);
  const int64_t end = (unit + 1) * kUnit < stream.bytes ? (unit + 1) * kUnit : stream.bytes;
  uint64_t chain[16] = {};
  for (int64_t at = unit * kUnit; at + 128 <= end; at += 128) {
    uint64_t words[16];
    memcpy(words, stream.data + at, sizeof words);
    for (int i = 0; i < 16; i++) chain[i] ^= words[i];
  }
  uint64_t all = 0;
  for (const uint64_t word : chain) all ^= word;
  stream.result.fetch_xor(all, std::memory_order_relaxed);
}

}  // namespace

extern "C" uint64_t fewbit_read_stream(const void* data, int64_t bytes, int32_t threads) {
  Stream stream;
  stream.data = static_cast<const uint8_t*>(data);
  stream.bytes = bytes;
  fewbit::parallel((bytes + kUnit - 1) / kUnit, threads, read_unit, &stream);
  return stream.result.load();
}
