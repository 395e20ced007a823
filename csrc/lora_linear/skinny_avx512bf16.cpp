// skinny in bfloat16 for AVX-512 BF16, called only on processors that have it.
#if defined(__AVX512BF16__)
#include "skinny_avx512.h"

namespace vlmteacher::skinny {

void product_bfloat16(int64_t m, int64_t n, int64_t k, float alpha, const Matrix& left, const Matrix& right,
                      bool accumulate, void* out, int64_t out_stride, bool wide) {
  product_of<BFloat16>(m, n, k, alpha, left, right, accumulate, out, out_stride, wide);
}

void round(const float* from, int64_t count, float factor, void* to) {
  const __m512 factors = _mm512_set1_ps(factor);
  for (; count > 0; count -= kLanes, from += kLanes, to = static_cast<char*>(to) + 2 * kLanes)
    BFloat16::store(static_cast<char*>(to), lanes(count),
                    _mm512_mul_ps(factors, Float32::load(reinterpret_cast<const char*>(from), lanes(count))));
}

}  // namespace vlmteacher::skinny
#endif
