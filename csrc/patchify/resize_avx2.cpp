// resize.h for processors with AVX2, called only where they are.
#include "resize.h"

namespace vlmteacher::resize {

Resample<float>* resample_avx2() {
#ifdef __AVX2__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return resample<float>;
#endif
  return nullptr;
}

}  // namespace vlmteacher::resize
