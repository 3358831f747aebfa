// SPDX-License-Identifier: Apache-2.0
// Signs times signs.
#include "core/rounded.h"

namespace fewbit {
namespace {

constexpr int64_t kSmall = 1 << 21;  // pairs of signs below which a second thread costs more than it brings
constexpr int64_t kMostColumns = 1 << 24;

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

bool sensible(const fewbit_matrix& w, int64_t) {
  return !w.arranged && w.bits == 1 && w.columns <= kMostColumns && w.block == w.columns && w.family == FEWBIT_AFFINE &&
         w.zero == 0.5f && !w.offset && !w.table;
}

bool shared(const fewbit_matrix&, const fewbit_matrix&, int64_t) { return true; }

XnorTask task_of(const fewbit_matrix& w) {
  XnorTask task{};
  task.rows = w.rows, task.columns = w.columns, task.chunks = ceil_div(w.columns, 32);
  task.codes = w.codes, task.scale = w.scale, task.scale_half = w.scale_half;
  return task;
}

int run(const fewbit_output* outputs, int32_t count, const fewbit_input& x, int64_t, int32_t y_dtype, int32_t isa,
        int32_t threads) {
  RoundedCall<XnorTask, XnorKernel> call{};
  call.kernel = find(isa);
  if (!call.kernel) return FEWBIT_NO_KERNEL;
  for (int32_t i = 0; i < count; i++) {
    XnorTask& task = call.task[i] = task_of(*outputs[i].matrix);
    task.together = x.tokens <= 2 ? x.tokens : call.kernel->most;
  }
  const int64_t bytes = call.task[0].chunks * call.kernel->words * 4;
  const auto place = [&](XnorTask& task, char* scratch, int64_t tokens) {
    task.words = reinterpret_cast<uint32_t*>(scratch);
    task.x_scale = reinterpret_cast<float*>(scratch + tokens * bytes);
  };
  return run_rounded(call, outputs, count, x, y_dtype, 1, bytes, 1, kSmall, threads, place);
}

}  // namespace

const Products sign_products = {sensible, shared, run};

}  // namespace fewbit
