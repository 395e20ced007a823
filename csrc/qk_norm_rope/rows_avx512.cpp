// rows.h for processors with AVX-512, called only where they are.
#include "rows.h"

namespace vlmteacher::qk_norm_rope {

template <class T>
Rows<T>* rows_avx512() {
#ifdef __AVX512F__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma"))
    return rows<T>;
#endif
  return nullptr;
}

template Rows<float>* rows_avx512();
template Rows<BFloat16>* rows_avx512();

}  // namespace vlmteacher::qk_norm_rope
