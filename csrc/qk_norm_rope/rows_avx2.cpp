// rows.h compiled for AVX2; called only on processors that have it.
#include "rows.h"

namespace vlmteacher::qk_norm_rope {

template <class T>
Rows<T>* rows_avx2() {
  return rows<T>;
}

template Rows<float>* rows_avx2();
template Rows<BFloat16>* rows_avx2();

}  // namespace vlmteacher::qk_norm_rope
