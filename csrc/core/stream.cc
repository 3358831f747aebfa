// SPDX-License-Identifier: Apache-2.0
// How fast this machine reads memory: what the speed of a kernel is a share of.
#include <string.h>

#include <atomic>

#include "core/pool.h"
#include "fewbit.h"

namespace {

constexpr int64_t kUnit = 1 << 18;
constexpr int kAtOnce = 4;  // places of a unit that are read in turn: one stream alone does not keep memory busy

struct Stream {
  const uint8_t* data;
  int64_t bytes;
  std::atomic<uint64_t> result{0};
};

void read_unit(void* context, int64_t unit) {
  Stream& stream = *static_cast<Stream*>(context);
  const int64_t left = stream.bytes - unit * kUnit, groups = (left < kUnit ? left : kUnit) / 128, part = groups / kAtOnce;
  const uint8_t* data = stream.data + unit * kUnit;
  uint64_t chain[16] = {};
  const auto take = [&](int64_t group) {
    uint64_t words[16];
    memcpy(words, data + group * 128, sizeof words);
    for (int i = 0; i < 16; i++) chain[i] ^= words[i];
  };
  for (int64_t group = 0; group < part; group++)
    for (int p = 0; p < kAtOnce; p++) take(p * part + group);
  for (int64_t group = part * kAtOnce; group < groups; group++) take(group);
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
