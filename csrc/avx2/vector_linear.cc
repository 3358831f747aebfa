// SPDX-License-Identifier: Apache-2.0
#include "avx2/simd.h"

namespace fewbit {
namespace {

constexpr int kAccumulators = 8;  // of 16 registers: entries and activations take some too

// Two entries of 4 numbers.
inline F beside(const float* const (&entry)[2]) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(entry[0])), _mm_loadu_ps(entry[1]), 1);
}
inline F beside(const uint16_t* const (&entry)[2]) {
  const __m128i low = _mm_loadu_si64(entry[0]), high = _mm_loadu_si64(entry[1]);
  return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
}

}  // namespace
}  // namespace fewbit

#include "core/vector.h"

namespace fewbit {

const VectorKernel vector_linear_avx2 = {8, vector_run, vector_decode};

}  // namespace fewbit
