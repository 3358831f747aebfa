// SPDX-License-Identifier: Apache-2.0
// fewbit_linear_xnor: checks, scratch, and the two phases that threads share: tokens are rounded to signs, then row
// tiles are handed out.
#include <cstddef>
#include <new>

#include "core/kernel.h"
#include "core/pool.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kWordBytes = 256 * 1024;  // of rounded tokens: they stay in a second-level cache
constexpr int64_t kTilesPerUnit = 4;
constexpr int64_t kSmall = 1 << 21;  // pairs of signs below which a second thread costs more than it brings
constexpr int64_t kMostColumns = 1 << 24;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const XnorKernel* find(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (isa) {
    case FEWBIT_SERIAL: return &xnor_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &xnor_linear_avx2;
    case FEWBIT_AVX512VPOPCNT: return &xnor_linear_avx512vpopcnt;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return &xnor_linear_neon;
#endif
    default: return nullptr;
  }
}

struct Call {
  XnorTask task;
  const XnorKernel* kernel;
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

bool sensible(const fewbit_matrix& w, const void* x, int64_t x_stride, int64_t tokens, const void* y, int64_t y_stride,
              int32_t threads) {
  return w.bits == 1 && fewbit_tile16_bytes(w.rows, w.columns, 1) > 0 && w.columns <= kMostColumns &&
         w.block == w.columns && w.family == FEWBIT_AFFINE && w.zero == 0.5f && !w.offset && !w.table && w.codes &&
         w.scale && threads > 0 && tokens >= 0 && (tokens == 0 || (x && y)) &&
         (tokens <= 1 || (x_stride >= 0 && y_stride >= w.rows));
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_linear_xnor(const fewbit_matrix* matrix, const float* x, int64_t x_stride, int64_t tokens,
                                  const float* bias, float* y, int64_t y_stride, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix, x, x_stride, tokens, y, y_stride, threads)) return FEWBIT_BAD_ARGUMENT;
  threads = thread_count(threads);
  Call call{};
  call.kernel = find(isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  if (tokens == 0) return FEWBIT_OK;
  XnorTask& task = call.task;
  task.rows = matrix->rows, task.columns = matrix->columns, task.chunks = ceil_div(matrix->columns, 32);
  task.codes = matrix->codes, task.scale = matrix->scale, task.scale_half = matrix->scale_half;
  task.bias = bias, task.y_stride = y_stride;
  call.x_stride = x_stride;
  task.together = tokens <= 2 ? tokens : call.kernel->most;
  const int64_t bytes = task.chunks * call.kernel->words * 4;
  const int64_t padded = ceil_div(tokens, task.together) * task.together;
  const int64_t fit = least(kXnorTokens, kWordBytes / bytes) / task.together * task.together;
  const int64_t group = least(padded, fit < task.together ? task.together : fit);
  const std::size_t size = static_cast<std::size_t>(group * (bytes + 4));
  auto* scratch = static_cast<uint8_t*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!scratch) return FEWBIT_NO_MEMORY;
  task.words = reinterpret_cast<uint32_t*>(scratch);
  task.x_scale = reinterpret_cast<float*>(scratch + group * bytes);
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
