// SPDX-License-Identifier: Apache-2.0
// fewbit_vector_linear and fewbit_vector_decode: checks, activations laid out for a few tokens at a time, tiles handed
// to threads.
#include <cstddef>
#include <new>

#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/pool.h"
#include "core/products.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kMostTokens = 32;   // whose panel exists at a time
constexpr int64_t kSmall = 1 << 17;   // multiply-adds below which a second thread costs more than it brings

const VectorKernel* find(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (isa) {
    case FEWBIT_SERIAL: return &vector_linear_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2: return &vector_linear_avx2;
    case FEWBIT_AVX512: return &vector_linear_avx512;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return &vector_linear_neon;
#endif
    default: return nullptr;
  }
}

bool known_bits(int32_t bits) { return bits >= 4 && bits <= 16; }

bool sensible(const fewbit_vectors& w) {
  const bool dims = w.dim == 2 || w.dim == 4 || w.dim == 6 || w.dim == 8 || w.dim == 12 || w.dim == 16;
  const bool residual = w.residual ? known_bits(w.residual_bits) : w.residual_bits == 0;
  return w.rows > 0 && w.columns > 0 && w.rows < (int64_t{1} << 40) / w.columns && dims && known_bits(w.bits) &&
         residual && w.block > 0 && w.block <= w.columns && w.codes && w.book;
}

int64_t tiles_of(const fewbit_vectors& w) { return ceil_div(w.rows, 8 * w.dim); }

VectorTask task_of(const fewbit_vectors& w) {
  VectorTask task{};
  task.bits = w.bits, task.residual_bits = w.residual_bits, task.half = w.half;
  task.dim = w.dim, task.width = w.dim <= 4 ? 4 : w.dim <= 8 ? 8 : 16;
  task.rows = w.rows, task.columns = w.columns, task.block = w.block;
  task.codes = w.codes, task.book = w.book, task.residual = w.residual;
  return task;
}

struct Call {
  VectorTask task;
  const VectorKernel* kernel;
  int64_t first, stride;  // of decoding
  float* out;
};

void compute_tile(void* context, int64_t tile) {
  const Call& call = *static_cast<const Call*>(context);
  call.kernel->run(call.task, tile);
}

void decode_tile(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  call.kernel->decode(call.task, call.first + unit, call.out + unit * 8 * call.task.dim, call.stride);
}

// The least power of two that holds `tokens`, or `most`.
int64_t together(int64_t tokens, int64_t most) {
  int64_t count = 1;
  while (count < tokens && count < most) count *= 2;
  return count;
}

// out: (tokens / apart, columns, apart) from x, zeros for tokens that do not exist.
void lay_out(const fewbit_input& x, int64_t columns, int64_t apart, float* out) {
  constexpr int64_t kPart = 512;
  float buffer[kPart];
  for (int64_t token = 0; token < round_up(x.tokens, apart); token++) {
    float* here = out + token / apart * apart * columns + token % apart;
    for (int64_t first = 0; first < columns; first += kPart) {
      const int64_t count = least(kPart, columns - first);
      const float* part = token < x.tokens ? floats(x, token, first, count, buffer) : nullptr;
      for (int64_t k = 0; k < count; k++) here[(first + k) * apart] = part ? part[k] : 0.0f;
    }
  }
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_vector_linear(const fewbit_vectors* matrix, const fewbit_input* x, const float* bias, void* y,
                                    int64_t y_stride, int32_t y_dtype, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix) || !x || !well_formed(*x) || threads < 1 || !known_dtype(y_dtype) ||
      (x->tokens > 0 && !y) || (x->tokens > 1 && y_stride < matrix->rows))
    return FEWBIT_BAD_ARGUMENT;
  Call call{task_of(*matrix), find(isa), 0, 0, nullptr};
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  if (x->tokens == 0) return FEWBIT_OK;
  VectorTask& task = call.task;
  task.bias = bias, task.y_stride = y_stride, task.y_dtype = y_dtype;
  task.together = together(x->tokens, call.kernel->most);
  const int64_t group = group_of(x->tokens, task.together, kMostTokens);
  const std::size_t size = static_cast<std::size_t>(group * task.columns) * sizeof(float);
  float* panel = static_cast<float*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!panel) return FEWBIT_NO_MEMORY;
  task.panel = panel;
  for (int64_t token = 0; token < x->tokens; token += group) {
    const fewbit_input part = tokens_of(*x, token, group);
    lay_out(part, task.columns, task.together, panel);
    task.tokens = part.tokens, task.y = static_cast<char*>(y) + token * y_stride * bytes_of(y_dtype);
    const bool small = task.rows * task.columns * part.tokens < kSmall;
    parallel(tiles_of(*matrix), small ? 1 : thread_count(threads), compute_tile, &call);
  }
  operator delete(panel, std::align_val_t(64));
  return FEWBIT_OK;
}

extern "C" int fewbit_vector_decode(const fewbit_vectors* matrix, int64_t tile_begin, int64_t tile_end, float* out,
                                    int64_t stride, int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !sensible(*matrix) || threads < 1 || tile_begin < 0 || tile_begin > tile_end || !out ||
      tile_end > tiles_of(*matrix) || stride < (tile_end - tile_begin) * 8 * matrix->dim)
    return FEWBIT_BAD_ARGUMENT;
  Call call{task_of(*matrix), find(isa), tile_begin, stride, out};
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  parallel(tile_end - tile_begin, thread_count(threads), decode_tile, &call);
  return FEWBIT_OK;
}
