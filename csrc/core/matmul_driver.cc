// SPDX-License-Identifier: Apache-2.0
// fewbit_int8_matmul: matrices, or blocks of their rows, are handed out; each worker rounds what it multiplies.
#include "core/matmul.h"

#include <cstddef>
#include <new>

#include "core/pool.h"
#include "core/products.h"

namespace fewbit {
namespace {

constexpr int64_t kRowsPerUnit = 256;  // for which b is rounded once
constexpr int64_t kSmall = 1 << 16;    // multiply-adds below which a second thread costs more than it brings
constexpr int64_t kMostInner = 1 << 15;

const MatmulKernel* find(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (float_isa(isa)) {
    case FEWBIT_SERIAL: return &int8_matmul_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &int8_matmul_avx2;
    case FEWBIT_AVX512: return &int8_matmul_avx512;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return &int8_matmul_neon;
#endif
    default: return nullptr;
  }
}

struct Call {
  MatmulTask task;  // of the first matrices, all rows
  const MatmulKernel* kernel;
  int64_t middle, blocks, units, workers;  // blocks of rows of a matrix
  char* scratch;
  int64_t left, right, lines, factor, bytes;  // of a worker's scratch: bytes of its parts, the rest is `gathered`; of all
};

fewbit_operand moved(fewbit_operand from, int64_t outer, int64_t middle, int64_t row) {
  const int64_t by = outer * from.stride_outer + middle * from.stride_middle + row * from.stride_row;
  from.data = static_cast<const float*>(from.data) + by;
  return from;
}

// A worker takes every workers-th unit.
void work(void* context, int64_t worker) {
  const Call& call = *static_cast<const Call*>(context);
  char* scratch = call.scratch + worker * call.bytes;
  MatmulTask task = call.task;
  task.left = reinterpret_cast<int16_t*>(scratch), task.right = reinterpret_cast<int16_t*>(scratch += call.left);
  task.lines = reinterpret_cast<int16_t*>(scratch += call.right);
  task.factor = reinterpret_cast<float*>(scratch += call.lines);
  task.gathered = reinterpret_cast<float*>(scratch + call.factor);
  for (int64_t unit = worker; unit < call.units; unit += call.workers) {
    const int64_t matrix = unit / call.blocks, outer = matrix / call.middle, middle = matrix % call.middle;
    const int64_t row = unit % call.blocks * kRowsPerUnit;
    task.a = moved(call.task.a, outer, middle, row), task.b = moved(call.task.b, outer, middle, 0);
    task.rows = least(kRowsPerUnit, call.task.rows - row);
    task.y = call.task.y + (matrix * call.task.rows + row) * task.columns;
    call.kernel->pack(task);
    call.kernel->run(task);
  }
}

bool sensible(const fewbit_operand* operand) {
  return operand && operand->data && operand->bits >= 1 && operand->bits <= 8 && operand->scale > 0 &&
         operand->zero >= 0 && operand->zero < 1 << operand->bits;
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_int8_matmul(const fewbit_operand* a, const fewbit_operand* b, int64_t outer, int64_t middle,
                                  int64_t rows, int64_t inner, int64_t columns, float* y, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!sensible(a) || !sensible(b) || outer < 1 || middle < 1 || rows < 1 || inner < 1 || inner > kMostInner ||
      columns < 1 || !y || threads < 1)
    return FEWBIT_BAD_ARGUMENT;
  Call call{};
  call.kernel = find(isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  MatmulTask& task = call.task;
  task.a = *a, task.b = *b, task.rows = rows, task.inner = inner, task.columns = columns, task.y = y;
  task.pairs = ceil_div(inner, 2), task.strips = ceil_div(columns, kStripColumns);
  call.middle = middle, call.blocks = ceil_div(rows, kRowsPerUnit), call.units = outer * middle * call.blocks;
  call.workers = outer * middle * rows * inner * columns < kSmall ? 1 : least(thread_count(threads), call.units);
  const int64_t padded = task.strips * kStripColumns, inners = 2 * task.pairs;
  const int64_t lines = kMatmulRows * (inners > columns ? inners : columns);
  const int64_t gathered = lines > kGathered ? lines : kGathered;
  call.left = round_up(kMatmulRows * inners * 2, 64), call.right = padded * inners * 2;
  call.lines = round_up(gathered * 2, 64), call.factor = padded * 4;
  call.bytes = round_up(call.left + call.right + call.lines + call.factor + gathered * 4, 64);
  const auto size = static_cast<std::size_t>(call.workers * call.bytes);
  call.scratch = static_cast<char*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!call.scratch) return FEWBIT_NO_MEMORY;
  parallel(call.workers, static_cast<int32_t>(call.workers), work, &call);
  operator delete(call.scratch, std::align_val_t(64));
  return FEWBIT_OK;
}
