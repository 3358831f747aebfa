// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

namespace fewbit {

// Calls work(context, unit) once for every unit in [0, units), on at most `threads` threads, the caller being one.
// Returns when all are done. Units must be independent: which thread runs which is not defined. A call made while
// another is in flight runs on its caller alone.
void parallel(int64_t units, int32_t threads, void (*work)(void* context, int64_t unit), void* context);

// The threads that a call uses which asks for `threads`: those of fewbit_set_threads, where it was called.
int32_t thread_count(int32_t threads);

}  // namespace fewbit
