// SPDX-License-Identifier: Apache-2.0
// fewbit_vector_linear_int8: checks, activations rounded, tiles of codes handed to threads.
#include "core/rounded.h"

namespace fewbit {
namespace {

constexpr int64_t kSmall = 1 << 18;  // multiply-adds below which a second thread costs more than it brings

const Int8VectorKernel* find(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (isa) {
    case FEWBIT_SERIAL: return &int8_vector_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX512VBMI: return &int8_vector_linear_avx512vbmi;
#endif
    default: return nullptr;
  }
}

bool known_bits(int32_t bits) { return bits >= 4 && bits <= 8; }

bool sensible(const fewbit_byte_vectors& w, int64_t x_block) {
  const bool dims = w.dim == 2 || w.dim == 4 || w.dim == 6 || w.dim == 8 || w.dim == 12 || w.dim == 16;
  return w.rows > 0 && w.columns > 0 && w.rows < (int64_t{1} << 40) / w.columns && dims && known_bits(w.bits) &&
         (w.residual_bits == 0 || known_bits(w.residual_bits)) && w.block > 0 && w.block <= w.columns && x_block > 0 &&
         segment_columns(w.columns, w.block, x_block) > 0 && w.codes && w.book && w.step && w.offset;
}

Int8VectorTask task_of(const fewbit_byte_vectors& w, int64_t x_block) {
  Int8VectorTask task{};
  const int64_t columns = segment_columns(w.columns, w.block, x_block);
  task.bits = w.bits, task.residual_bits = w.residual_bits, task.books = w.residual_bits ? 2 : 1;
  task.entries = w.bits <= 6 && w.residual_bits <= 6 ? 64 : 256;
  task.dim = w.dim, task.rows = ceil_div(w.rows, w.dim), task.out_rows = w.rows;
  task.columns = w.columns, task.chunks = ceil_div(w.columns, 32);
  task.segments = ceil_div(w.columns, columns), task.segment_chunks = columns / 32;
  task.x_blocks = ceil_div(w.columns, x_block);
  task.block_segments = w.block < w.columns ? w.block / columns : task.segments;
  task.x_block_segments = x_block < w.columns ? x_block / columns : task.segments;
  task.codes = w.codes, task.book = w.book, task.vector_step = w.step, task.vector_offset = w.offset;
  return task;
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_vector_linear_int8(const fewbit_byte_vectors* matrix, int64_t x_block, const fewbit_input* x,
                                         const float* bias, void* y, int64_t y_stride, int32_t y_dtype, int32_t isa,
                                         int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix, x_block) || !x || !well_formed(*x) || threads < 1 || !known_dtype(y_dtype) ||
      (x->tokens > 0 && !y) || (x->tokens > 1 && y_stride < matrix->rows))
    return FEWBIT_BAD_ARGUMENT;
  RoundedCall<Int8VectorTask, Int8VectorKernel> call{};
  call.kernel = find(isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  Int8VectorTask& task = call.task[0] = task_of(*matrix, x_block);
  task.together = x->tokens <= 2 ? x->tokens : 4;
  const auto place = [&](Int8VectorTask& t, char* scratch, int64_t tokens) {
    t.activations = scratch;
    t.sums = reinterpret_cast<float*>(scratch + tokens * t.chunks * 32);
    t.x_scale = t.sums + tokens * t.segments;
    t.start = t.x_scale + tokens * t.x_blocks;
  };
  const int64_t floats = task.segments + task.x_blocks + task.dim;
  const fewbit_output output = {nullptr, bias, y, y_stride};
  return run_rounded(call, &output, 1, *x, y_dtype, 1, task.chunks * 32, floats, kSmall / task.dim, thread_count(threads),
                     place);
}
