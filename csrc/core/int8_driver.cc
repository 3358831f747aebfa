// SPDX-License-Identifier: Apache-2.0
// Integer products: scratch, and the two phases that threads share: tokens are rounded, then row tiles are handed out.
#include <string.h>

#include <cstddef>
#include <new>

#include "core/kernel.h"
#include "core/pool.h"
#include "core/products.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kActivationBytes = 256 * 1024;  // of rounded tokens: they stay in a second-level cache
constexpr int64_t kTilesPerUnit = 4;
constexpr int64_t kSmall = 1 << 18;  // multiply-adds below which a second thread costs more than it brings

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t units_of(int64_t rows) { return ceil_div(rows, 16 * kTilesPerUnit); }
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
  Int8Task task[kMostShared];  // one a matrix; what concerns the activations is the same in all
  int32_t count;
  FixedPoint table;  // of all of them
  const Int8Kernel* kernel;
  fewbit_input x;
};

void prepare(void* context, int64_t token) {
  const Call& call = *static_cast<const Call*>(context);
  call.kernel->prepare(call.task[0], call.x, token);
}

// Unit = kTilesPerUnit row tiles of one matrix, counted through all of them.
void compute(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const Int8Task* task = call.task;
  for (; unit >= units_of(task->rows); task++) unit -= units_of(task->rows);
  const int64_t begin = unit * kTilesPerUnit;
  call.kernel->run(*task, begin, least(begin + kTilesPerUnit, ceil_div(task->rows, 16)), call.x.tokens);
}

bool sensible(const fewbit_matrix& w, int64_t x_block) {
  const bool lut = w.family == FEWBIT_LUT && w.bits <= kLookedUp && w.table && w.zero == 0.0f;
  return (lut || (w.family == FEWBIT_AFFINE && !w.table)) && segment(w.columns, w.block, x_block) > 0;
}

bool shared(const fewbit_matrix& a, const fewbit_matrix& b, int64_t x_block) {
  if (a.family != b.family) return false;
  if (a.table && (a.bits != b.bits || memcmp(a.table, b.table, sizeof(float) << a.bits))) return false;
  return segment(a.columns, a.block, x_block) == segment(b.columns, b.block, x_block);
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

int run(const fewbit_output* outputs, int32_t count, const fewbit_input& x, int64_t x_block, int32_t y_dtype,
        int32_t isa, int32_t threads) {
  Call call{};
  const float* table = outputs[0].matrix->table;
  if (table && !fixed_point(table, outputs[0].matrix->bits, &call.table)) return FEWBIT_BAD_ARGUMENT;
  call.kernel = find(table ? &call.table : nullptr, isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  const int64_t tokens = x.tokens, together = tokens <= 2 ? tokens : tokens <= 4 ? 4 : call.kernel->most;
  if (tokens == 0) return FEWBIT_OK;
  int64_t units = 0, weights = 0;
  for (Int8Task* task = call.task; call.count < count; task++) {
    const fewbit_output& output = outputs[call.count++];
    *task = task_of(*output.matrix, x_block);
    task->table = table ? &call.table : nullptr;
    task->bias = output.bias, task->y_stride = output.y_stride, task->y_dtype = y_dtype, task->together = together;
    units += units_of(task->rows), weights += task->rows * task->columns;
  }
  const Int8Task& first = call.task[0];
  const int64_t bytes = first.chunks * 32 * call.kernel->bytes, padded = round_up(tokens, together);
  const int64_t fit = least(kInt8Tokens, kActivationBytes / bytes) / together * together;
  const int64_t group = least(padded, fit < together ? together : fit);
  const int64_t floats = first.segments + first.x_blocks;
  const std::size_t size = static_cast<std::size_t>(group * (bytes + floats * 4));
  auto* scratch = static_cast<int8_t*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!scratch) return FEWBIT_NO_MEMORY;
  for (int64_t token = 0; token < tokens; token += group) {
    call.x = tokens_of(x, token, group);
    for (int32_t i = 0; i < count; i++) {
      Int8Task& task = call.task[i];
      task.activations = scratch;
      task.sums = reinterpret_cast<float*>(scratch + group * bytes);
      task.x_scale = task.sums + group * task.segments;
      task.y = rows_of(outputs[i], y_dtype, token);
    }
    const int32_t used = weights * call.x.tokens < kSmall ? 1 : threads;
    parallel(round_up(call.x.tokens, together), used, prepare, &call);
    parallel(units, used, compute, &call);
  }
  operator delete(scratch, std::align_val_t(64));
  return FEWBIT_OK;
}

}  // namespace

const Products int8_products = {sensible, shared, run};

}  // namespace fewbit
