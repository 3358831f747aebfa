// SPDX-License-Identifier: Apache-2.0
// The call of a kernel that rounds activations: scratch, and the two phases that threads share: a few tokens are rounded,
// then row tiles are handed out.
#pragma once

#include <cstddef>
#include <new>

#include "core/kernel.h"
#include "core/pool.h"
#include "core/products.h"

namespace fewbit {
namespace {

constexpr int64_t kRoundedBytes = 512 * 1024;  // of rounded tokens: they stay in a second-level cache

template <class Task, class Kernel>
struct RoundedCall {
  Task task[kMostShared];  // one a matrix; what concerns the activations is the same in all
  const Kernel* kernel;
  fewbit_input x;
};

template <class Call>
void round_one(void* context, int64_t token) {
  const Call& call = *static_cast<const Call*>(context);
  call.kernel->prepare(call.task[0], call.x, token);
}

// Computes the outputs of `call`, whose tasks and kernel are set. `digits`: rows of activations that a token takes;
// `bytes`: of a row, without its scales and sums, which are `floats`. `place(task, scratch, rows)` points a task at its
// activations. `small`: multiply-adds below
// which a second thread costs more than it brings.
template <class Task, class Kernel, class Place>
int run_rounded(RoundedCall<Task, Kernel>& call, const fewbit_output* outputs, int32_t count, const fewbit_input& x,
                int32_t y_dtype, int64_t digits, int64_t bytes, int64_t floats, int64_t small, int32_t threads, Place place) {
  if (x.tokens == 0) return FEWBIT_OK;
  const int64_t together = call.task[0].together / digits;
  const int64_t group = group_of(x.tokens, together, least(kRoundedTokens, kRoundedBytes / bytes) / digits);
  int64_t units = 0, weights = 0;
  for (int32_t i = 0; i < count; i++) {
    Task& task = call.task[i];
    task.bias = outputs[i].bias, task.y_stride = outputs[i].y_stride, task.y_dtype = y_dtype;
    units += units_of(task.rows), weights += task.rows * task.columns;
  }
  const auto size = static_cast<std::size_t>(group * digits * (bytes + floats * 4));
  auto* scratch = static_cast<char*>(operator new(size, std::align_val_t(64), std::nothrow));
  if (!scratch) return FEWBIT_NO_MEMORY;
  for (int64_t token = 0; token < x.tokens; token += group) {
    call.x = tokens_of(x, token, group);
    for (int32_t i = 0; i < count; i++) {
      place(call.task[i], scratch, group * digits);
      call.task[i].y = rows_of(outputs[i], y_dtype, token);
    }
    const int32_t used = weights * call.x.tokens < small ? 1 : threads;
    parallel(round_up(call.x.tokens, together), used, round_one<RoundedCall<Task, Kernel>>, &call);
    parallel(units, used, compute<RoundedCall<Task, Kernel>>, &call);
  }
  operator delete(scratch, std::align_val_t(64));
  return FEWBIT_OK;
}

}  // namespace
}  // namespace fewbit
