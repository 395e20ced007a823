// resize.h for processors with AVX-512, called only where they are.
#include "resize.h"

namespace vlmteacher::resize {

#ifdef __AVX512F__

bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

void resample_avx512(const float* const* from, const Band<float>& y, const Band<float>& x, const Part<float>& part,
                     float* scratch, float* to) {
  resample(from, y, x, part, scratch, to);
}

#else

bool has_avx512() { return false; }
void resample_avx512(const float* const*, const Band<float>&, const Band<float>&, const Part<float>&, float*, float*) {}

#endif

}  // namespace vlmteacher::resize
