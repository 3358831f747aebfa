// SPDX-License-Identifier: Apache-2.0
#include "neon/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 4;

}  // namespace
}  // namespace fewbit

#include "core/quotient.h"

#include "core/int8_windows.h"

namespace fewbit {

const WindowsKernel int8_windows_neon = {windows_run};

}  // namespace fewbit
