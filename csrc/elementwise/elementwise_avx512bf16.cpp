// elementwise in bfloat16 for AVX-512 BF16, called only on processors that have it.
#if defined(__AVX512BF16__)
#include "elementwise_avx512.h"

namespace vlmteacher::elementwise {

void rotate_bfloat16_avx512bf16(bool back, int64_t heads, int64_t width, const char* x, int64_t stride,
                                const float* cos, const float* sin, char* out) {
  rotate_of<BFloat16>(back, heads, width, x, stride, cos, sin, out);
}

void gelu_bfloat16_avx512bf16(int64_t count, const char* x, const char* grad, char* out) {
  gelu_of<BFloat16>(count, x, grad, out);
}

}  // namespace vlmteacher::elementwise
#endif
