// SPDX-License-Identifier: Apache-2.0
#include "avx512/simd.h"

namespace fewbit {
namespace {

constexpr int kAccumulators = 16;  // of 32 registers
constexpr int64_t kMost = 8;

// Two entries of 8 numbers.
inline F beside(const float* const (&entry)[2]) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(entry[0])), _mm256_loadu_ps(entry[1]), 1);
}
inline __m128i load128(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline F beside(const uint16_t* const (&entry)[2]) {
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(load128(entry[0])), load128(entry[1]), 1));
}

// Four entries of 4 numbers.
inline F beside(const float* const (&entry)[4]) {
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(entry[0])), _mm_loadu_ps(entry[1]), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(entry[2])), _mm_loadu_ps(entry[3]), 1);
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
inline F beside(const uint16_t* const (&entry)[4]) {
  const __m128i low = _mm_unpacklo_epi64(_mm_loadu_si64(entry[0]), _mm_loadu_si64(entry[1]));
  const __m128i high = _mm_unpacklo_epi64(_mm_loadu_si64(entry[2]), _mm_loadu_si64(entry[3]));
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}

}  // namespace
}  // namespace fewbit

#include "core/vector.h"

namespace fewbit {

const VectorKernel vector_linear_avx512 = {kMost, vector_run, vector_decode};

}  // namespace fewbit
