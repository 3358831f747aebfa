// SPDX-License-Identifier: Apache-2.0
// fewbit_sparse_add: checks, scratch, and the two phases that threads share: activations are laid out for a few tokens,
// then windows of rows are handed out.
#include <cstddef>
#include <new>

#include "core/dtypes.h"
#include "core/kernel.h"
#include "core/pool.h"
#include "core/products.h"
#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int64_t kColumnsPerUnit = 512;
constexpr int64_t kSmall = 1 << 16;  // entries times tokens below which a second thread costs more than it brings

// Two tokens one after the other already take longer than a vector of eight.
int64_t together_of(int64_t tokens) { return tokens < 2 ? int64_t{1} : kSparseTokens; }

const SparseKernel* find(int32_t isa) {
  if (!(fewbit_caps() & isa)) return nullptr;
  switch (float_isa(isa)) {
    case FEWBIT_SERIAL: return &sparse_add_serial;
#if defined(__x86_64__)
    case FEWBIT_AVX2:
    case FEWBIT_AVX512: return &sparse_add_avx2;
#elif defined(__aarch64__)
    case FEWBIT_NEON: return &sparse_add_neon;
#endif
    default: return nullptr;
  }
}

bool sensible(const fewbit_sparse& w) {
  if (w.rows < 1 || w.columns < 1 || !w.start || !w.order || w.start[0] != 0) return false;
  if (w.columns > (w.index_bytes == 2 ? 0xffff : 0x7fffffff) || (w.index_bytes != 2 && w.index_bytes != 4)) return false;
  const int64_t slices = ceil_div(w.rows, kSlice);
  for (int64_t s = 0; s < slices; s++)
    if (w.start[s + 1] < w.start[s]) return false;
  return !w.start[slices] || (w.index && w.value);
}

struct Call {
  SparseTask task;
  const SparseKernel* kernel;
  fewbit_input x;
  float* panel;
};

// Unit = kColumnsPerUnit columns of the panel, the zeros at its end included. Tokens that pad a group are zeros.
void lay_out(void* context, int64_t unit) {
  const Call& call = *static_cast<const Call*>(context);
  const int64_t columns = call.task.matrix->columns, together = call.task.together, first = unit * kColumnsPerUnit;
  const int64_t count = least(kColumnsPerUnit, columns - first);
  float buffer[kColumnsPerUnit];
  for (int64_t t = 0; t < together; t++) {
    const bool exists = t < call.x.tokens;
    const float* x = exists && count ? floats(call.x, t, first, count, buffer) : buffer;
    float* out = call.panel + first * together + t;
    for (int64_t k = 0; k < count; k++) out[k * together] = exists ? x[k] : 0.0f;
    if (count < kColumnsPerUnit) out[count * together] = 0.0f;
  }
}

void add_unit(void* context, int64_t window) {
  const Call& call = *static_cast<const Call*>(context);
  call.kernel->run(call.task, window);
}

}  // namespace
}  // namespace fewbit

extern "C" int fewbit_sparse_add(const fewbit_sparse* matrix, const fewbit_input* x, float* y, int64_t y_stride,
                                 int32_t isa, int32_t threads) {
  using namespace fewbit;
  if (!matrix || !x || threads < 1 || !sensible(*matrix) || !well_formed(*x) || (x->tokens > 0 && !y) ||
      (x->tokens > 1 && y_stride < matrix->rows))
    return FEWBIT_BAD_ARGUMENT;
  Call call{};
  call.kernel = find(isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  const int64_t entries = matrix->start[ceil_div(matrix->rows, kSlice)] * kSlice;
  if (!entries) return FEWBIT_OK;
  const auto size = static_cast<std::size_t>((matrix->columns + 1) * together_of(x->tokens)) * 4;
  call.panel = static_cast<float*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!call.panel) return FEWBIT_NO_MEMORY;
  for (int64_t token = 0; token < x->tokens; token += call.x.tokens) {
    const int64_t together = together_of(x->tokens - token);
    call.x = tokens_of(*x, token, together);
    call.task = {matrix, call.panel, together, call.x.tokens, y + token * y_stride, y_stride};
    const int32_t used = entries * call.x.tokens < kSmall ? 1 : thread_count(threads);
    parallel(matrix->columns / kColumnsPerUnit + 1, together == 1 ? 1 : used, lay_out, &call);
    parallel(ceil_div(matrix->rows, kWindow), used, add_unit, &call);
  }
  operator delete(call.panel, std::align_val_t(64));
  return FEWBIT_OK;
}
