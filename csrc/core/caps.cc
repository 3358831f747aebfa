// SPDX-License-Identifier: Apache-2.0
// What this machine can run: CPUID says what the processor has, XGETBV what the system saves for it.
#include "core/kernel.h"
#include "fewbit.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// Measured: Zen 4 does; on Sapphire Rapids four places are faster.
bool fewbit::reads_straight() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

#if defined(__x86_64__)
namespace {

// Of which older compilers know no name.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
}

}  // namespace
#endif

namespace {

#if defined(__aarch64__) && defined(__linux__)
constexpr unsigned long kHasI8mm = 1ul << 13;  // HWCAP2_I8MM, of which older headers know no name
#endif

int32_t find_caps() {
  int32_t caps = FEWBIT_SERIAL;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // Every processor with AVX2 has F16C; the compiler's name for the check is not understood by older compilers.
  if (avx2) caps |= FEWBIT_AVX2;
  if (avx2 && has_avx_vnni()) caps |= FEWBIT_AVXVNNI;
  if (avx512) caps |= FEWBIT_AVX512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni) caps |= FEWBIT_AVX512VNNI;
  if (vnni && __builtin_cpu_supports("avx512vbmi")) caps |= FEWBIT_AVX512VBMI;
  // On Sapphire Rapids its products are slower than those of float32.
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd")) caps |= FEWBIT_AVX512BF16;
  if (avx512 && __builtin_cpu_supports("avx512vpopcntdq")) caps |= FEWBIT_AVX512VPOPCNT;
#elif defined(__aarch64__)
  caps |= FEWBIT_NEON;
#if defined(__APPLE__)
  caps |= FEWBIT_NEONDOT;  // every 64-bit Mac has it
  int has = 0;
  size_t size = sizeof has;
  if (!sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) && has) caps |= FEWBIT_NEONI8MM;
#elif defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) caps |= FEWBIT_NEONDOT;
  if (caps & FEWBIT_NEONDOT && getauxval(AT_HWCAP2) & kHasI8mm) caps |= FEWBIT_NEONI8MM;
#endif
#endif
  return caps;
}

}  // namespace

// Found once: a virtual machine asks its host at every CPUID, for longer than a small product takes.
extern "C" int32_t fewbit_caps(void) {
  static const int32_t caps = find_caps();
  return caps;
}
