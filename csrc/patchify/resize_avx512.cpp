// resize.h for processors with AVX-512, called only where they are.
#include "resize.h"

namespace vlmteacher::resize {

Resample<float>* resample_avx512() {
#ifdef __AVX512F__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma"))
    return resample<float>;
#endif
  return nullptr;
}

}  // namespace vlmteacher::resize
