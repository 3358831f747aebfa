// SPDX-License-Identifier: Apache-2.0
#include "serial/simd.h"

namespace fewbit {
namespace {

constexpr int kVectors = 2;

// Divided as written: without fused multiply-adds a correction is no cheaper.
inline F quotient(F x, F scale, F) { return x / scale; }

}  // namespace
}  // namespace fewbit

#include "core/int8_windows.h"

namespace fewbit {

const WindowsKernel int8_windows_serial = {windows_run};

}  // namespace fewbit
