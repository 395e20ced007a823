// rows.h for processors with AVX2, called only where they are.
#include "rows.h"

namespace vlmteacher::qk_norm_rope {

template <class T>
Rows<T>* rows_avx2() {
  return supported() ? rows<T> : nullptr;
}

template Rows<float>* rows_avx2();
template Rows<BFloat16>* rows_avx2();

}  // namespace vlmteacher::qk_norm_rope
