// SPDX-License-Identifier: Apache-2.0
// Memory that is read from end to end, and how fast this machine reads it: what the speed of a kernel is a share of.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#include "core/pool.h"
#include "core/stream.h"
#include "fewbit.h"

namespace {

constexpr int64_t kUnit = 1 << 18;

struct Stream {
  const uint8_t* data;
  int64_t bytes;
  uint64_t (*read)(const uint8_t*, int64_t);
  std::atomic<uint64_t> result{0};
};

void read_unit(void* context, int64_t unit) {
  Stream& stream = *static_cast<Stream*>(context);
  const int64_t left = stream.bytes - unit * kUnit;
  const uint64_t all = stream.read(stream.data + unit * kUnit, left < kUnit ? left : kUnit);
  stream.result.fetch_xor(all, std::memory_order_relaxed);
}

}  // namespace

extern "C" uint64_t fewbit_read_stream(const void* data, int64_t bytes, int32_t threads) {
  Stream stream;
  stream.data = static_cast<const uint8_t*>(data);
  stream.bytes = bytes;
  stream.read = fewbit::read_places;
#if defined(__x86_64__)
  if (fewbit_caps() & FEWBIT_AVX512) stream.read = fewbit::read_avx512;
#endif
  fewbit::parallel((bytes + kUnit - 1) / kUnit, threads, read_unit, &stream);
  return stream.result.load();
}

extern "C" void fewbit_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (data && bytes > 0 && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}
