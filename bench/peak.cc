// SPDX-License-Identifier: Apache-2.0
// The arithmetic peaks of one core, for bench/limits.py: independent chains of the widest instruction that this
// compiler may use (-march=native). Returned are the operations done, a multiplication and an addition counting two.
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int kChains = 10;  // two a cycle of 5 cycles each; more would not stay in 16 registers

#if defined(__AVX512VNNI__)
using Bytes = __m512i;
const char kInt8[] = "vpdpbusd, 512 bits";
inline Bytes dot(Bytes sum, Bytes a, Bytes b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
using Bytes = __m256i;
const char kInt8[] = "vpdpbusd, 256 bits";
inline Bytes dot(Bytes sum, Bytes a, Bytes b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX2__)
using Bytes = __m256i;
// Sums in int16: what codes of few bits come close to, and any longer sum, which must widen them, stays below.
const char kInt8[] = "vpmaddubsw + vpaddw, 256 bits";
inline Bytes dot(Bytes sum, Bytes a, Bytes b) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); }
#elif defined(__ARM_FEATURE_DOTPROD)
using Bytes = int8x16_t;
const char kInt8[] = "sdot, 128 bits";
inline Bytes dot(Bytes sum, Bytes a, Bytes b) {
  return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(sum), a, b));
}
#else
#error "no product of bytes is known here"
#endif

#if defined(__AVX512F__)
using Floats = __m512;
const char kFloat[] = "vfmadd, 512 bits";
inline Floats fma(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
#elif defined(__FMA__)
using Floats = __m256;
const char kFloat[] = "vfmadd, 256 bits";
inline Floats fma(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }
#elif defined(__aarch64__)
using Floats = float32x4_t;
const char kFloat[] = "fmla, 128 bits";
inline Floats fma(Floats sum, Floats a, Floats b) { return vfmaq_f32(sum, a, b); }
#endif

// The compiler must neither know the value nor keep a product of it for the next round.
template <class V>
inline void hide(V& v) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(v));
#else
  __asm__ volatile("" : "+w"(v));
#endif
}

template <class V, class Step>
double run(int64_t rounds, int lanes, Step step) {
  V sum[kChains] = {}, a = {}, b = {};
  hide(a), hide(b);
  for (int64_t i = 0; i < rounds; i++) {
    for (V& s : sum) {
      hide(a);
      s = step(s, a, b);
      hide(s);
    }
  }
  return 2.0 * static_cast<double>(rounds) * kChains * lanes;
}

}  // namespace

extern "C" {

const char* peak_int8_name() { return kInt8; }
const char* peak_float_name() { return kFloat; }
double peak_int8(int64_t rounds) { return run<Bytes>(rounds, sizeof(Bytes), dot); }
double peak_float(int64_t rounds) { return run<Floats>(rounds, sizeof(Floats) / 4, fma); }
}
