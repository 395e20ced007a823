// rows.h compiled for AVX-512; called only on processors that have it.
#include "rows.h"

namespace vlmteacher::qk_norm_rope {

template <class T>
Rows<T>* rows_avx512() {
  return rows<T>;
}

template Rows<float>* rows_avx512();
template Rows<BFloat16>* rows_avx512();

}  // namespace vlmteacher::qk_norm_rope
