// SPDX-License-Identifier: Apache-2.0
// fewbit_linear: checks, scratch, and the two phases that threads share. Activations are laid out for the kernel (the
// panel) for a few tokens at a time, so that the panel stays in the second-level cache; then row tiles are handed out.
#include <cstddef>
#include <new>

#include "core/kernel.h"
#include "core/pool.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kPanelBytes = 512 * 1024;  // about half of a second-level cache
constexpr int64_t kMostTokens = 32;
constexpr int64_t kTilesPerUnit = 4;
constexpr int64_t kChunksPerUnit = 16;
constexpr int64_t kSmall = 1 << 17;  // multiply-adds below which a second thread costs more than it brings

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const Kernel* find(int32_t family, int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  const bool affine = family == FEWBIT_AFFINE;
  switch (isa) {
    case FEWBIT_SERIAL: return affine ? &affine_linear_serial : &lut_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return affine ? &affine_linear_avx2 : &lut_linear_avx2;
    case FEWBIT_AVX512: return affine ? &affine_linear_avx512 : &lut_linear_avx512;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return affine ? &affine_linear_neon : &lut_linear_neon;
#endif
    default: return nullptr;
  }
}

// One group of tokens of one call.
struct Call {
  Task task;
  const Kernel* kernel;
  const float* x;
  int64_t x_stride, tokens, panel_floats, segments;
  float *panel, *sums;
};

// Sum of the activations of one block, in eight chains.
float block_sum(const float* x, int64_t count) {
  float chain[8] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
    for (int i = 0; i < 8; i++) chain[i] += x[k + i];
  for (; k < count; k++) chain[k % 8] += x[k];
  return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

// Unit = one segment of kChunksPerUnit chunks of one token: its panel, and the sums of the blocks that begin in it.
// Tokens that pad a group are zeros.
void prepare(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const Task& task = call.task;
  const int64_t token = unit / call.segments, first = unit % call.segments * kChunksPerUnit;
  const int64_t chunks = least(kChunksPerUnit, task.chunks - first), apart = task.together;
  const bool exists = token < call.tokens;
  const float* x = call.x + (exists ? token * call.x_stride : 0);
  const int64_t at = (token / apart * task.chunks + first) * apart + token % apart;
  call.kernel->panel(task.bits, task.mode, task.table, x + first * 32, exists ? task.columns - first * 32 : 0, chunks,
                     call.panel + at * call.panel_floats, apart * call.panel_floats);
  if (!call.sums) return;
  const int64_t end = least((first + chunks) * 32, task.columns);
  for (int64_t b = ceil_div(first * 32, task.block); b * task.block < end; b++)
    call.sums[token * task.blocks + b] =
        exists ? block_sum(x + b * task.block, least(task.block, task.columns - b * task.block)) : 0.0f;
}

void compute(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t begin = unit * kTilesPerUnit, tiles = ceil_div(call.task.rows, 16);
  call.kernel->run(call.task, begin, least(begin + kTilesPerUnit, tiles), call.tokens);
}

// Tiles of one fewbit_decode.
struct Decoding {
  Task task;
  const Kernel* kernel;
  int64_t first, stride;
  float* out;
};

void decode_unit(void* context, int64_t unit) {
  const Decoding& call = *static_cast<const Decoding*>(context);
  call.kernel->decode(call.task, call.first + unit, call.out + unit * 16, call.stride);
}

bool sensible(const fewbit_matrix& w, const void* x, int64_t x_stride, int64_t tokens, const void* y, int64_t y_stride,
              int32_t threads) {
  const bool family = w.family == FEWBIT_AFFINE ? !w.table : w.family == FEWBIT_LUT && w.table && w.zero == 0.0f;
  return fewbit_tile16_bytes(w.rows, w.columns, w.bits) > 0 && w.block > 0 && w.block <= w.columns && family &&
         w.codes && w.scale && threads > 0 && tokens >= 0 && (tokens == 0 || (x && y)) &&
         (tokens <= 1 || (x_stride >= 0 && y_stride >= w.rows));
}

Task task_of(const fewbit_matrix& w, int64_t tokens) {
  Task task{};
  task.bits = w.bits, task.scale_half = w.scale_half, task.offset_half = w.offset_half;
  task.rows = w.rows, task.columns = w.columns, task.chunks = ceil_div(w.columns, 32);
  task.block = w.block, task.blocks = ceil_div(w.columns, w.block);
  task.mode = w.block % 32 != 0 && task.blocks > 1 ? kGeneric : tokens < kBatchTokens ? kSingle : kBatch;
  task.zero = w.zero, task.codes = w.codes, task.scale = w.scale, task.offset = w.offset, task.table = w.table;
  return task;
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_linear(const fewbit_matrix* matrix, const float* x, int64_t x_stride, int64_t tokens,
                             const float* bias, float* y, int64_t y_stride, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix, x, x_stride, tokens, y, y_stride, threads)) return FEWBIT_BAD_ARGUMENT;
  threads = thread_count(threads);
  Call call{};
  call.kernel = find(matrix->family, isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  if (tokens == 0) return FEWBIT_OK;
  Task& task = call.task = task_of(*matrix, tokens);
  task.bias = bias, task.y_stride = y_stride;
  call.panel_floats = call.kernel->panel_floats(task.bits, task.mode);
  call.segments = ceil_div(task.chunks, kChunksPerUnit);
  call.x_stride = x_stride;
  const int64_t panel = task.chunks * call.panel_floats;
  // Tokens computed together, and tokens whose panels exist at a time: what fits the cache.
  const int64_t most = task.mode == kSingle ? 2 : task.mode == kBatch ? 8 : 4;
  task.together = tokens == 1 ? 1 : task.mode == kBatch && tokens <= 4 ? 4 : most;
  const int64_t padded = ceil_div(tokens, task.together) * task.together;
  const int64_t fit = least(kMostTokens, kPanelBytes / (panel * 4)) / task.together * task.together;
  const int64_t group = least(padded, fit < task.together ? task.together : fit);
  const bool sums = task.offset || task.zero != 0.0f;
  const int64_t floats = group * (panel + (sums ? task.blocks : 0));
  float* scratch =
      static_cast<float*>(operator new(static_cast<std::size_t>(floats) * 4, std::align_val_t(64), std::nothrow));
  if (!scratch) return FEWBIT_NO_MEMORY;
  task.panel = call.panel = scratch;
  task.sums = call.sums = sums ? scratch + group * panel : nullptr;
  for (int64_t token = 0; token < tokens; token += group) {
    call.tokens = least(group, tokens - token);
    call.x = x + token * x_stride;
    task.y = y + token * y_stride;
    const int32_t used = task.rows * task.columns * call.tokens < kSmall ? 1 : threads;
    parallel(ceil_div(call.tokens, task.together) * task.together * call.segments, used, prepare, &call);
    parallel(ceil_div(ceil_div(task.rows, 16), kTilesPerUnit), used, compute, &call);
  }
  operator delete(scratch, std::align_val_t(64));
  return FEWBIT_OK;
}

extern "C" int fewbit_decode(const fewbit_matrix* matrix, int64_t tile_begin, int64_t tile_end, float* out,
                             int64_t stride, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix, nullptr, 0, 0, nullptr, 0, threads)) return FEWBIT_BAD_ARGUMENT;
  if (tile_begin < 0 || tile_end > ceil_div(matrix->rows, 16) || tile_begin > tile_end || !out ||
      stride < (tile_end - tile_begin) * 16)
    return FEWBIT_BAD_ARGUMENT;
  Decoding call = {task_of(*matrix, 1), find(matrix->family, isa), tile_begin, stride, out};
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  parallel(tile_end - tile_begin, thread_count(threads), decode_unit, &call);
  return FEWBIT_OK;
}
