// SPDX-License-Identifier: Apache-2.0
// Float products: scratch, and the two phases that threads share. Activations are laid out for the kernel (the
// panel) for a few tokens at a time, so that the panel stays in the second-level cache; then row tiles are handed out.
#include <string.h>

#include <cstddef>
#include <new>

#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/pool.h"
#include "core/products.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kPanelBytes = 512 * 1024;  // about half of a second-level cache
constexpr int64_t kMostTokens = 32;
constexpr int64_t kColumnsPerUnit = 512;
constexpr int64_t kSmall = 1 << 17;  // multiply-adds below which a second thread costs more than it brings

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
  Task task[kMostShared];  // one a matrix; what concerns the activations is the same in all
  const Kernel* kernel;
  fewbit_input x;
  int64_t panel_floats, segments;
  float *panel, *sums;
};

// Sum of columns [first, first + count) of a token, in eight chains.
float block_sum(const fewbit_input& source, int64_t token, int64_t first, int64_t count) {
  float chain[8] = {}, buffer[kColumnsPerUnit];
  for (int64_t begin = 0; begin < count; begin += kColumnsPerUnit) {
    const int64_t here = least(kColumnsPerUnit, count - begin);
    const float* x = floats(source, token, first + begin, here, buffer);
    int64_t k = 0;
    for (; k + 8 <= here; k += 8)
      for (int i = 0; i < 8; i++) chain[i] += x[k + i];
    for (; k < here; k++) chain[k % 8] += x[k];
  }
  return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

// Unit = one segment of kColumnsPerUnit columns of one token: its panel, and the sums of the blocks that begin in it.
// Tokens that pad a group are zeros.
void prepare(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const Task& task = call.task[0];
  const int64_t token = unit / call.segments, first = unit % call.segments * kColumnsPerUnit;
  const bool exists = token < call.x.tokens;
  const int64_t columns = least(kColumnsPerUnit, task.columns - first), apart = task.together;
  float buffer[kColumnsPerUnit];
  const float* x = exists ? floats(call.x, token, first, columns, buffer) : buffer;
  const int64_t at = (token / apart * task.chunks + first / 32) * apart + token % apart;
  call.kernel->panel(task.bits, task.generic, task.table, x, exists ? columns : 0, ceil_div(columns, 32),
                     call.panel + at * call.panel_floats, apart * call.panel_floats);
  if (!call.sums) return;
  for (int64_t b = ceil_div(first, task.block); b * task.block < first + columns; b++)
    call.sums[token * task.blocks + b] =
        exists ? block_sum(call.x, token, b * task.block, least(task.block, task.columns - b * task.block)) : 0.0f;
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

bool decodes(const fewbit_matrix& w) {
  return w.family == FEWBIT_AFFINE ? !w.table : w.family == FEWBIT_LUT && w.table && w.zero == 0.0f;
}

bool sensible(const fewbit_matrix& w, int64_t) { return !w.arranged && decodes(w); }

// Whether the panel and the sums are the same. The kernel decides which of these they depend on; all of them may.
bool shared(const fewbit_matrix& a, const fewbit_matrix& b, int64_t) {
  return a.family == b.family && a.bits == b.bits && a.block == b.block &&
         (!a.table || !memcmp(a.table, b.table, sizeof(float) << a.bits));
}

Task task_of(const fewbit_matrix& w) {
  Task task{};
  task.bits = w.bits, task.scale_half = w.scale_half, task.offset_half = w.offset_half;
  task.rows = w.rows, task.columns = w.columns, task.chunks = ceil_div(w.columns, 32);
  task.block = w.block, task.blocks = ceil_div(w.columns, w.block);
  task.generic = w.block % 32 != 0 && task.blocks > 1;
  task.zero = w.zero, task.codes = w.codes, task.scale = w.scale, task.offset = w.offset, task.table = w.table;
  return task;
}

bool needs_sums(const Task& task) { return task.offset || task.zero != 0.0f; }

// Tokens computed together.
int64_t together(bool generic, int64_t tokens) {
  if (tokens == 1) return 1;
  return generic ? 4 : tokens == 2 ? 2 : tokens <= 4 ? 4 : 8;
}

int run(const fewbit_output* outputs, int32_t count, const fewbit_input& x, int64_t, int32_t y_dtype, int32_t isa,
        int32_t threads) {
  Call call{};
  Task& first = call.task[0];
  call.kernel = find(outputs[0].matrix->family, isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  int64_t units = 0, weights = 0;
  bool sums = false;
  for (int32_t i = 0; i < count; i++) {
    Task& task = call.task[i] = task_of(*outputs[i].matrix);
    task.bias = outputs[i].bias, task.y_stride = outputs[i].y_stride, task.y_dtype = y_dtype;
    task.together = together(task.generic, x.tokens);
    units += units_of(task.rows), weights += task.rows * task.columns;
    sums |= needs_sums(task);
  }
  call.panel_floats = call.kernel->panel_floats(first.bits, first.generic);
  call.segments = ceil_div(first.columns, kColumnsPerUnit);
  // Tokens whose panels exist at a time: what fits the cache.
  const int64_t panel = first.chunks * call.panel_floats;
  const int64_t group = group_of(x.tokens, first.together, least(kMostTokens, kPanelBytes / (panel * 4)));
  const std::size_t size = static_cast<std::size_t>(group * (panel + (sums ? first.blocks : 0))) * 4;
  float* scratch = static_cast<float*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!scratch) return FEWBIT_NO_MEMORY;
  call.panel = scratch;
  call.sums = sums ? scratch + group * panel : nullptr;
  for (int64_t token = 0; token < x.tokens; token += group) {
    call.x = tokens_of(x, token, group);
    for (int32_t i = 0; i < count; i++) {
      Task& task = call.task[i];
      task.panel = call.panel, task.sums = needs_sums(task) ? call.sums : nullptr;
      task.y = rows_of(outputs[i], y_dtype, token);
    }
    const int32_t used = weights * call.x.tokens < kSmall ? 1 : threads;
    parallel(round_up(call.x.tokens, first.together) * call.segments, used, prepare, &call);
    parallel(units, used, compute<Call>, &call);
  }
  operator delete(scratch, std::align_val_t(64));
  return FEWBIT_OK;
}

// Tiles [begin, end) of an arranged matrix, decoded from a copy in tile16.
int decode_arranged(fewbit_matrix w, int64_t begin, int64_t end, float* out, int64_t stride, int32_t isa, int32_t threads) {
  const int64_t rows = (end - begin) * 16, bytes = fewbit_tile16_bytes(16, w.columns, w.bits), size = (end - begin) * bytes;
  const int64_t parameters = begin * ceil_div(w.columns, w.block) * 16;
  auto* codes = static_cast<uint8_t*>(operator new(static_cast<std::size_t>(size), std::nothrow));
  if (!codes) return FEWBIT_NO_MEMORY;
  memcpy(codes, w.codes + begin * bytes, static_cast<std::size_t>(size));
  fewbit_arrange(rows, w.columns, w.bits, 1, codes);
  const auto from = [&](const void* values, int32_t half) -> const void* {
    return values ? static_cast<const char*>(values) + parameters * (half ? 2 : 4) : nullptr;
  };
  w.rows -= begin * 16, w.codes = codes, w.arranged = 0;
  w.scale = from(w.scale, w.scale_half), w.offset = from(w.offset, w.offset_half);
  const int code = fewbit_decode(&w, 0, end - begin, out, stride, isa, threads);
  operator delete(codes);
  return code;
}

}  // namespace

const Products float_products = {sensible, shared, run};

}  // namespace fewbit

extern "C" int fewbit_decode(const fewbit_matrix* matrix, int64_t tile_begin, int64_t tile_end, float* out,
                             int64_t stride, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !well_formed(*matrix) || !decodes(*matrix) || threads < 1) return FEWBIT_BAD_ARGUMENT;
  if (tile_begin < 0 || tile_end > ceil_div(matrix->rows, 16) || tile_begin > tile_end || !out ||
      stride < (tile_end - tile_begin) * 16)
    return FEWBIT_BAD_ARGUMENT;
  if (matrix->arranged && tile_begin < tile_end) return decode_arranged(*matrix, tile_begin, tile_end, out, stride, isa, threads);
  Decoding call = {task_of(*matrix), find(matrix->family, float_isa(isa)), tile_begin, stride, out};
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  parallel(tile_end - tile_begin, thread_count(threads), decode_unit, &call);
  return FEWBIT_OK;
}
