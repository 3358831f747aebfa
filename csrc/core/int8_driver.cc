// SPDX-License-Identifier: Apache-2.0
// fewbit_linear_int8: checks, scratch, and the two phases that threads share: tokens are rounded, then row tiles are
// handed out.
#include <cstddef>
#include <new>

#include "core/kernel.h"
#include "core/pool.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kActivationBytes = 256 * 1024;  // of rounded tokens: they stay in a second-level cache
constexpr int64_t kTilesPerUnit = 4;
constexpr int64_t kSmall = 1 << 18;  // multiply-adds below which a second thread costs more than it brings

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t divisor(int64_t a, int64_t b) { return b ? divisor(b, a % b) : a; }

// `table`: that of FEWBIT_LUT, else null.
const Int8Kernel* find(const FixedPoint* table, int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  const int words = table && !table->bytes;
  switch (isa) {
    case FEWBIT_SERIAL: return table ? &int8_lut_linear_serial[words] : &int8_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return table ? &int8_lut_linear_avx2[words] : &int8_linear_avx2;
    case FEWBIT_AVX512VNNI: return table ? &int8_lut_linear_avx512vnni[words] : &int8_linear_avx512vnni;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return table ? &int8_lut_linear_neon[words] : &int8_linear_neon;
    case FEWBIT_NEONDOT: return table ? &int8_lut_linear_neondot[words] : &int8_linear_neondot;
#endif
    default: return nullptr;
  }
}

// Columns a segment: the longest that stays within a block of either side; 0 where blocks are not whole chunks.
int64_t segment(int64_t columns, int64_t block, int64_t x_block) {
  int64_t common = 0;  // of the blocks that are no whole row; those that are end where the row does
  if (block < columns) common = divisor(block, common);
  if (x_block < columns) common = divisor(x_block, common);
  if (common % 32) return 0;
  if (common == 0) return kSegment;
  int64_t size = least(common, kSegment);
  while (common % size) size -= 32;
  return size;
}

struct Call {
  Int8Task task;
  FixedPoint table;
  const Int8Kernel* kernel;
  const float* x;
  int64_t x_stride, tokens;
};

void prepare(void* context, int64_t token) {
  const Call& call = *static_cast<const Call*>(context);
  call.kernel->prepare(call.task, token < call.tokens ? call.x + token * call.x_stride : nullptr, token);
}

void compute(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t begin = unit * kTilesPerUnit, tiles = ceil_div(call.task.rows, 16);
  call.kernel->run(call.task, begin, least(begin + kTilesPerUnit, tiles), call.tokens);
}

bool sensible(const fewbit_matrix& w, int64_t x_block, const void* x, int64_t x_stride, int64_t tokens, const void* y,
              int64_t y_stride, int32_t threads) {
  const bool lut = w.family == FEWBIT_LUT && w.bits <= kLookedUp && w.table && w.zero == 0.0f;
  return fewbit_tile16_bytes(w.rows, w.columns, w.bits) > 0 && w.block > 0 && w.block <= w.columns && x_block > 0 &&
         (lut || (w.family == FEWBIT_AFFINE && !w.table)) && w.codes && w.scale && threads > 0 && tokens >= 0 &&
         segment(w.columns, w.block, x_block) > 0 && (tokens == 0 || (x && y)) &&
         (tokens <= 1 || (x_stride >= 0 && y_stride >= w.rows));
}

Int8Task task_of(const fewbit_matrix& w, int64_t x_block) {
  Int8Task task{};
  const int64_t columns = segment(w.columns, w.block, x_block);
  task.bits = w.bits, task.scale_half = w.scale_half, task.offset_half = w.offset_half;
  task.rows = w.rows, task.columns = w.columns, task.chunks = ceil_div(w.columns, 32);
  task.segments = ceil_div(w.columns, columns), task.segment_chunks = columns / 32;
  task.blocks = ceil_div(w.columns, w.block), task.x_blocks = ceil_div(w.columns, x_block);
  task.block_segments = w.block < w.columns ? w.block / columns : task.segments;
  task.x_block_segments = x_block < w.columns ? x_block / columns : task.segments;
  task.zero = w.zero, task.codes = w.codes, task.scale = w.scale, task.offset = w.offset;
  return task;
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_linear_int8(const fewbit_matrix* matrix, int64_t x_block, const float* x, int64_t x_stride,
                                  int64_t tokens, const float* bias, float* y, int64_t y_stride, int32_t isa,
                                  int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix, x_block, x, x_stride, tokens, y, y_stride, threads)) return FEWBIT_BAD_ARGUMENT;
  threads = thread_count(threads);
  Call call{};
  Int8Task& task = call.task = task_of(*matrix, x_block);
  if (matrix->table) {
    if (!fixed_point(matrix->table, matrix->bits, &call.table)) return FEWBIT_BAD_ARGUMENT;
    task.table = &call.table;
  }
  call.kernel = find(task.table, isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  if (tokens == 0) return FEWBIT_OK;
  task.bias = bias, task.y_stride = y_stride;
  call.x_stride = x_stride;
  task.together = tokens <= 2 ? tokens : call.kernel->most;
  const int64_t bytes = task.chunks * 32 * call.kernel->bytes, padded = ceil_div(tokens, task.together) * task.together;
  const int64_t fit = least(kInt8Tokens, kActivationBytes / bytes) / task.together * task.together;
  const int64_t group = least(padded, fit < task.together ? task.together : fit);
  const int64_t floats = task.segments + task.x_blocks;
  const std::size_t size = static_cast<std::size_t>(group * (bytes + floats * 4));
  auto* scratch = static_cast<int8_t*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!scratch) return FEWBIT_NO_MEMORY;
  task.activations = scratch;
  task.sums = reinterpret_cast<float*>(scratch + group * bytes);
  task.x_scale = task.sums + group * task.segments;
  for (int64_t token = 0; token < tokens; token += group) {
    call.tokens = least(group, tokens - token);
    call.x = x + token * x_stride;
    task.y = y + token * y_stride;
    const int32_t used = task.rows * task.columns * call.tokens < kSmall ? 1 : threads;
    parallel(ceil_div(call.tokens, task.together) * task.together, used, prepare, &call);
    parallel(ceil_div(ceil_div(task.rows, 16), kTilesPerUnit), used, compute, &call);
  }
  operator delete(scratch, std::align_val_t(64));
  return FEWBIT_OK;
}
