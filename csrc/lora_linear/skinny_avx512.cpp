// skinny for AVX-512, called only on processors that have it.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include "skinny_avx512.h"

namespace vlmteacher::skinny {

void product_float32(int64_t m, int64_t n, int64_t k, float alpha, const Matrix& left, const Matrix& right,
                     bool accumulate, void* out, int64_t out_stride, bool wide) {
  product_of<Float32>(m, n, k, alpha, left, right, accumulate, out, out_stride, wide);
}

void product_bfloat16_avx512(int64_t m, int64_t n, int64_t k, float alpha, const Matrix& left, const Matrix& right,
                             bool accumulate, void* out, int64_t out_stride, bool wide) {
  product_of<BFloat16>(m, n, k, alpha, left, right, accumulate, out, out_stride, wide);
}

void round_avx512(const float* from, int64_t count, float factor, void* to) { round_of(from, count, factor, to); }

}  // namespace vlmteacher::skinny
#endif
