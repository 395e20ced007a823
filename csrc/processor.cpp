#include "processor.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vlmteacher {
namespace {

#if defined(__x86_64__)

// Whether the processor has AMX for bfloat16, and the system saves its registers (XCR0, bits 17 and 18).
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) == 3;
}

// Linux gives a process the registers of the tiles when it asks.
bool granted_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Processor detect() {
  __builtin_cpu_init();
  Processor best = Processor::kBaseline;
#if defined(BUILT_AVX2)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return best;
  best = Processor::kAvx2;
#if defined(BUILT_AVX512BF16)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl"))
    return best;
  best = Processor::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return best;
  best = Processor::kAvx512Bf16;
#if defined(EMULATED_TILES)
  return Processor::kAmxTiles;
#else
  if (!has_amx()) return best;
  best = Processor::kAmx;
#if defined(BUILT_AMX)
  if (granted_tiles()) best = Processor::kAmxTiles;
#endif
#endif
#endif
#endif
  return best;
}

#else

Processor detect() { return Processor::kBaseline; }

#endif

std::atomic<Processor>& current() {
  static std::atomic<Processor> used = widest();
  return used;
}

}  // namespace

Processor widest() {
  static const Processor found = detect();
  return found;
}

Processor processor() { return current().load(std::memory_order_relaxed); }

void limit(Processor most) { current() = most; }

}  // namespace vlmteacher
