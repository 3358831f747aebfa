// SPDX-License-Identifier: Apache-2.0
#include "core/stream.h"

namespace fewbit {

uint64_t read_avx512(const uint8_t* data, int64_t bytes) { return read_places(data, bytes); }

}  // namespace fewbit
