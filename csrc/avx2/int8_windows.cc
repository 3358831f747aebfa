// SPDX-License-Identifier: Apache-2.0
#include "avx2/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 2;

}  // namespace
}  // namespace fewbit

#include "core/quotient.h"

#include "core/int8_windows.h"

namespace fewbit {

const WindowsKernel int8_windows_avx2 = {windows_run};

}  // namespace fewbit
