// wide for AVX-512, called only on processors that have it.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include "wide_avx512.h"

namespace vlmteacher::wide {

void part_avx512(const Product& product, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  part_of(product, row, rows, panel, panels);
}

}  // namespace vlmteacher::wide
#endif
