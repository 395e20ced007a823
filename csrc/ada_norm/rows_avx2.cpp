// rows.h for processors with AVX2, called only where they are.
#include "rows.h"

namespace vlmteacher::ada_norm {

template <class T>
Rows<T> rows_avx2() {
#ifdef __AVX2__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {forward<T>, backward<T>};
#endif
  return {};
}

template Rows<float> rows_avx2();
template Rows<BFloat16> rows_avx2();

}  // namespace vlmteacher::ada_norm
