// SPDX-License-Identifier: Apache-2.0
// fewbit_vector_linear_int8: checks, activations rounded, tiles of codes handed to threads.
#include "core/rounded.h"

namespace fewbit {
namespace {

constexpr int64_t kMostSummed = 1 << 16;  // columns whose products of bytes an int32 holds: 255 * 128 * 2^16 < 2^31
constexpr int64_t kSmall = 1 << 18;  // multiply-adds below which a second thread costs more than it brings

const Int8VectorKernel* find(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (isa) {
    case FEWBIT_SERIAL: return &int8_vector_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &int8_vector_linear_avx2;
    case FEWBIT_AVX512VBMI: return &int8_vector_linear_avx512vbmi;
#endif
    default: return nullptr;
  }
}

bool is_wide(const fewbit_byte_vectors& w) { return w.bits > 8 || w.residual_bits > 8; }

bool known_bits(int32_t bits, bool wide) { return wide ? bits >= 8 && bits <= 16 : bits >= 4 && bits <= 8; }

bool sensible(const fewbit_byte_vectors& w, int64_t x_block) {
  const bool dims = w.dim == 2 || w.dim == 4 || w.dim == 6 || w.dim == 8 || w.dim == 12 || w.dim == 16;
  return w.rows > 0 && w.columns > 0 && w.rows < (int64_t{1} << 40) / w.columns && dims && known_bits(w.bits, is_wide(w)) &&
         (w.residual_bits == 0 || known_bits(w.residual_bits, is_wide(w))) && w.block > 0 && w.block <= w.columns && x_block > 0 &&
         segment_columns(w.columns, w.block, x_block) > 0 && w.codes && w.book && w.step && w.offset;
}

int64_t tokens_together(int64_t tokens, int64_t most) {
  if (tokens <= 2) return tokens;
  return least(most, tokens <= 4 ? 4 : tokens <= 8 ? 8 : most);
}

// Columns whose products are summed up before they are scaled: of wide books a whole row where it has one of each scale.
int64_t summed_columns(const fewbit_byte_vectors& w, int64_t x_block) {
  const bool whole = w.block >= w.columns && x_block >= w.columns && w.columns <= kMostSummed;
  return is_wide(w) && whole ? round_up(w.columns, 32) : segment_columns(w.columns, w.block, x_block);
}

Int8VectorTask task_of(const fewbit_byte_vectors& w, int64_t x_block) {
  Int8VectorTask task{};
  const int64_t columns = summed_columns(w, x_block);
  task.bits = w.bits, task.residual_bits = w.residual_bits, task.books = w.residual_bits ? 2 : 1;
  task.wide = is_wide(w), task.width = w.dim <= 8 ? 8 : 16;
  task.entries = w.bits <= 6 && w.residual_bits <= 6 ? 64 : 256;
  const int64_t gathered = (int64_t{1} << w.bits) + (w.residual_bits ? int64_t{1} << w.residual_bits : 0);
  task.book_bytes = task.wide ? gathered * task.width : task.books * w.dim * task.entries;
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
  task.together = tokens_together(x->tokens, task.wide ? call.kernel->most_wide : call.kernel->most);
  const int64_t bytes = task.chunks * 32 * call.kernel->bytes;
  const auto place = [&](Int8VectorTask& t, char* scratch, int64_t tokens) {
    t.activations = scratch;
    t.sums = reinterpret_cast<float*>(scratch + tokens * bytes);
    t.x_scale = t.sums + tokens * t.segments;
    t.start = t.x_scale + tokens * t.x_blocks;
  };
  const int64_t floats = task.segments + task.x_blocks + task.dim;
  const fewbit_output output = {nullptr, bias, y, y_stride};
  return run_rounded(call, &output, 1, *x, y_dtype, 1, bytes, floats, kSmall / task.dim, thread_count(threads),
                     place);
}
