// elementwise for AVX-512, called only on processors that have it.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include "elementwise_avx512.h"

namespace vlmteacher::elementwise {

void rotate_float32(bool back, int64_t heads, int64_t width, const char* x, int64_t stride, const float* cos,
                    const float* sin, char* out) {
  rotate_of<Float32>(back, heads, width, x, stride, cos, sin, out);
}

void gelu_float32(int64_t count, const char* x, const char* grad, char* out) { gelu_of<Float32>(count, x, grad, out); }

void rotate_bfloat16_avx512(bool back, int64_t heads, int64_t width, const char* x, int64_t stride, const float* cos,
                            const float* sin, char* out) {
  rotate_of<BFloat16>(back, heads, width, x, stride, cos, sin, out);
}

void gelu_bfloat16_avx512(int64_t count, const char* x, const char* grad, char* out) {
  gelu_of<BFloat16>(count, x, grad, out);
}

}  // namespace vlmteacher::elementwise
#endif
