// rows.h compiled for AVX-512; called only on processors that have it.
#include "rows.h"

namespace vlmteacher::ada_norm {

template <class T>
Rows<T> rows_avx512() {
  return {forward, backward};
}

template Rows<float> rows_avx512();
template Rows<BFloat16> rows_avx512();

}  // namespace vlmteacher::ada_norm
