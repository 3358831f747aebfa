// SPDX-License-Identifier: Apache-2.0
// fewbit_row_linear, fewbit_row_linear_int8 and fewbit_row_decode: checks, activations as padded float32, or rounded, for a
// few tokens at a time, rows handed to threads.
#include <string.h>

#include <cstddef>
#include <new>

#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/pool.h"
#include "core/products.h"
#include "core/rounded.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kMostColumns = 1 << 16;  // whose sums of integers cannot overflow
constexpr int64_t kRows = 32;         // that a thread takes at a time
constexpr int64_t kSmall = 1 << 17;   // multiply-adds below which a second thread costs more than it brings

const RowKernel* find(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (isa) {
    case FEWBIT_SERIAL: return &row_lut_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &row_lut_linear_avx2;
    case FEWBIT_AVX512: return &row_lut_linear_avx512;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return &row_lut_linear_neon;
#endif
    default: return nullptr;
  }
}

// Columns of a chunk; 0 where there are no codes of so many bits.
int64_t chunk_columns(int32_t bits) {
  switch (bits) {
    case 1: case 2: case 4: case 8: return 128 / bits;
    case 3: case 6: return 384 / bits;
    default: return 0;
  }
}

bool sensible(const fewbit_row_tables& w) {
  const int64_t chunk = chunk_columns(w.bits);
  return chunk && w.rows > 0 && w.columns > 0 && w.rows < (int64_t{1} << 40) / w.columns && w.block > 0 &&
         (w.block >= w.columns || w.block % chunk == 0) && w.table_rows > 0 && w.codes && w.table && w.scale &&
         (w.halves == 0 || (w.halves == 1 && w.bits == 3));
}

RowTask task_of(const fewbit_row_tables& w) {
  RowTask task{};
  const int64_t chunk = chunk_columns(w.bits);
  task.bits = w.bits, task.table_half = w.table_half, task.rows = w.rows, task.columns = w.columns;
  task.chunks = ceil_div(w.columns, chunk), task.blocks = ceil_div(w.columns, w.block);
  task.block_chunks = ceil_div(w.block, chunk), task.table_rows = w.table_rows;
  task.codes = w.codes, task.table = w.table, task.scale = w.scale;
  return task;
}

const Int8RowKernel* find_int8(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (isa) {
    case FEWBIT_SERIAL: return &int8_row_lut_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &int8_row_lut_linear_avx2;
    case FEWBIT_AVXVNNI: return &int8_row_lut_linear_avxvnni;
    case FEWBIT_AVX512VNNI: return &int8_row_lut_linear_avx512vnni;
#elif defined(__aarch64__)
    case FEWBIT_NEONDOT: return &int8_row_lut_linear_neondot;
#endif
    default: return nullptr;
  }
}

bool sensible(const fewbit_row_levels& w) {
  return w.bits >= 1 && w.bits <= 4 && w.rows > 0 && w.columns > 0 && w.columns <= kMostColumns && w.table_rows > 0 &&
         w.codes && w.levels && w.factor && (w.halves == 0 || (w.halves == 1 && w.bits == 3));
}

Int8RowTask task_of(const fewbit_row_levels& w) {
  Int8RowTask task{};
  const int64_t chunk = chunk_columns(w.bits);
  task.bits = w.bits, task.rows = w.rows, task.columns = w.columns, task.table_rows = w.table_rows;
  task.chunks = ceil_div(w.columns, chunk), task.padded = round_up(task.chunks, 4) * chunk;
  task.codes = w.codes, task.levels = w.levels, task.factor = w.factor, task.halves = w.halves;
  return task;
}

struct Call {
  RowTask task;
  const RowKernel* kernel;
  int64_t first, last, stride;  // of decoding
  float* out;
};

void compute_rows(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  call.kernel->run(call.task, unit * kRows, least(unit * kRows + kRows, call.task.rows));
}

void decode_rows(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t begin = call.first + unit * kRows;
  for (int64_t row = begin; row < least(begin + kRows, call.last); row++)
    call.kernel->decode(call.task, row, call.out + (row - call.first) * call.stride);
}

// Bits of lanes of three bytes, `apart` from byte to byte, eight lanes at a time: from codes one behind the other to halves, or
// back.
template <bool back>
void exchange_lanes(uint8_t* lanes, int64_t apart) {
  for (int64_t at = 0; at < apart; at += 8) {
    uint64_t from[3], to[3] = {};
    for (int v = 0; v < 3; v++) memcpy(&from[v], lanes + v * apart + at, 8);
#pragma GCC unroll 32
    for (int i = 0; i < 24; i++) {
      const int n = i / 3, bit = i % 3, byte = n < 6 ? n / 2 : bit, place = n < 6 ? n % 2 * 4 + bit : n % 2 * 4 + 3;
      const uint64_t one = 0x0101010101010101u;
      if constexpr (back) to[i / 8] |= (from[byte] >> place & one) << i % 8;
      else to[byte] |= (from[i / 8] >> i % 8 & one) << place;
    }
    for (int v = 0; v < 3; v++) memcpy(lanes + v * apart + at, &to[v], 8);
  }
}

// Rows from `begin` of a matrix in rowhalves16, decoded from a copy in row16, which begins with rows that share a table.
int decode_halves(fewbit_row_tables w, int64_t begin, int64_t end, float* out, int64_t stride, int32_t isa, int32_t threads) {
  const int64_t first = begin / w.table_rows * w.table_rows, bytes = ceil_div(w.columns, chunk_columns(w.bits)) * 48;
  const auto size = static_cast<std::size_t>((end - first) * bytes);
  auto* codes = static_cast<uint8_t*>(operator new(size, std::nothrow));
  if (!codes) return FEWBIT_NO_MEMORY;
  memcpy(codes, w.codes + first * bytes, size);
  fewbit_rowhalves16(end - first, w.columns, 1, codes);
  w.rows -= first, w.codes = codes, w.halves = 0, w.scale += first * ceil_div(w.columns, w.block);
  w.table = static_cast<const char*>(w.table) + (first / w.table_rows << w.bits) * (w.table_half ? 2 : 4);
  const int code = fewbit_row_decode(&w, begin - first, end - first, out, stride, isa, threads);
  operator delete(codes);
  return code;
}

// x as float32, rows of whole chunks; zeros for columns and tokens that do not exist.
void lay_out(const fewbit_input& x, int64_t tokens, int64_t columns, int64_t padded, float* out) {
  for (int64_t token = 0; token < tokens; token++, out += padded) {
    const int64_t have = token < x.tokens ? columns : 0;
    if (have) {
      const float* from = floats(x, token, 0, columns, out);
      if (from != out) memcpy(out, from, static_cast<size_t>(columns) * sizeof(float));
    }
    memset(out + have, 0, static_cast<size_t>(padded - have) * sizeof(float));
  }
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_row_linear(const fewbit_row_tables* matrix, const fewbit_input* x, const float* bias, void* y,
                                 int64_t y_stride, int32_t y_dtype, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix) || matrix->halves || !x || !well_formed(*x) || threads < 1 || !known_dtype(y_dtype) ||
      (x->tokens > 0 && !y) || (x->tokens > 1 && y_stride < matrix->rows))
    return FEWBIT_BAD_ARGUMENT;
  Call call{task_of(*matrix), find(isa), 0, 0, 0, nullptr};
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  if (x->tokens == 0) return FEWBIT_OK;
  RowTask& task = call.task;
  task.bias = bias, task.y_stride = y_stride, task.y_dtype = y_dtype;
  task.together = x->tokens == 1 ? int64_t{1} : kRowTokens;
  const int64_t group = group_of(x->tokens, task.together, kRowPanel), padded = task.chunks * chunk_columns(task.bits);
  const std::size_t size = static_cast<std::size_t>(group * padded) * sizeof(float);
  float* panel = static_cast<float*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!panel) return FEWBIT_NO_MEMORY;
  task.panel = panel;
  for (int64_t token = 0; token < x->tokens; token += group) {
    const fewbit_input part = tokens_of(*x, token, group);
    lay_out(part, round_up(part.tokens, task.together), task.columns, padded, panel);
    task.tokens = part.tokens, task.y = static_cast<char*>(y) + token * y_stride * bytes_of(y_dtype);
    const bool small = task.rows * task.columns * part.tokens < kSmall;
    parallel(ceil_div(task.rows, kRows), small ? 1 : thread_count(threads), compute_rows, &call);
  }
  operator delete(panel, std::align_val_t(64));
  return FEWBIT_OK;
}

extern "C" int fewbit_row_linear_int8(const fewbit_row_levels* matrix, const fewbit_input* x, const float* bias, void* y,
                                      int64_t y_stride, int32_t y_dtype, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix) || !x || !well_formed(*x) || threads < 1 || !known_dtype(y_dtype) ||
      (x->tokens > 0 && !y) || (x->tokens > 1 && y_stride < matrix->rows))
    return FEWBIT_BAD_ARGUMENT;
  RoundedCall<Int8RowTask, Int8RowKernel> call{};
  call.kernel = find_int8(isa);
  if (!call.kernel || (matrix->halves && isa != FEWBIT_AVX2)) return FEWBIT_NO_KERNEL;
  Int8RowTask& task = call.task[0] = task_of(*matrix);
  task.together = x->tokens == 1 ? int64_t{1} : kRowTokens;
  const auto place = [](Int8RowTask& t, char* scratch, int64_t tokens) {
    t.activations = scratch;
    t.x_scale = reinterpret_cast<float*>(scratch + tokens * t.padded);
    t.sums = reinterpret_cast<int32_t*>(t.x_scale + tokens);
    t.rests = t.sums + tokens;
  };
  const fewbit_output output = {nullptr, bias, y, y_stride};
  const int64_t floats = 2 + task.padded / 32 * call.kernel->rests;
  return run_rounded(call, &output, 1, *x, y_dtype, 1, task.padded, floats, kSmall, thread_count(threads), place);
}

extern "C" int fewbit_row_decode(const fewbit_row_tables* matrix, int64_t row_begin, int64_t row_end, float* out,
                                 int64_t stride, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix) || threads < 1 || row_begin < 0 || row_begin > row_end || !out ||
      row_end > matrix->rows || stride < matrix->columns)
    return FEWBIT_BAD_ARGUMENT;
  if (matrix->halves) return decode_halves(*matrix, row_begin, row_end, out, stride, isa, threads);
  Call call{task_of(*matrix), find(float_isa(isa)), row_begin, row_end, stride, out};
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  parallel(ceil_div(row_end - row_begin, kRows), thread_count(threads), decode_rows, &call);
  return FEWBIT_OK;
}

extern "C" int fewbit_rowhalves16(int64_t rows, int64_t columns, int32_t back, uint8_t* packed) {
  using namespace fewbit;
  if (rows < 0 || columns <= 0 || !packed) return FEWBIT_BAD_ARGUMENT;
  const int64_t chunks = ceil_div(columns, chunk_columns(3));
  for (int64_t row = 0; row < rows; row++)
    for (int64_t chunk = 0; chunk < chunks; chunk += kRowChunks) {
      const int64_t apart = least(chunks - chunk, kRowChunks) * 16;
      back ? exchange_lanes<true>(packed, apart) : exchange_lanes<false>(packed, apart);
      packed += 3 * apart;
    }
  return FEWBIT_OK;
}
