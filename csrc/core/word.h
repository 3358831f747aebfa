// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/inline.h"

namespace fewbit {
namespace {

// A T that lies anywhere.
template <class T>
FEWBIT_INLINE T word_at(const void* p) {
  T word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

}  // namespace
}  // namespace fewbit
