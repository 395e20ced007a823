// The kernels for elements of type T, Float32 or BFloat16. Compiled with AVX-512 flags and called only on processors
// that have it: use no library templates here, which the linker could share with code that runs on any processor.
#pragma once
#include "../avx512.h"
#include "elementwise.h"

namespace vlmteacher::elementwise {
namespace {

template <class T>
void rotate_of(bool back, int64_t heads, int64_t width, const char* x, int64_t stride, const float* cos,
               const float* sin, char* out) {
  const int64_t second = width * T::kBytes;
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 mask = lanes(width - i);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), turn = _mm512_maskz_loadu_ps(mask, sin + i);
    const __m512 s = back ? _mm512_sub_ps(_mm512_setzero_ps(), turn) : turn;
    const char* from = x + i * T::kBytes;
    char* to = out + i * T::kBytes;
    for (int64_t h = 0; h < heads; ++h, from += stride, to += 2 * second) {
      const __m512 a = T::load(from, mask), b = T::load(from + second, mask);
      T::store(to, mask, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
      T::store(to + second, mask, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
    }
  }
}

// x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), and its derivative.
template <class T>
void gelu_of(int64_t count, const char* x, const char* grad, char* out) {
  const __m512 one = _mm512_set1_ps(1), limit = _mm512_set1_ps(126);
  const __m512 linear = _mm512_set1_ps(2.3022082f), cubic = _mm512_set1_ps(0.10294324f);        // 2 log2(e) times u's
  const __m512 slope = _mm512_set1_ps(1.5957691f), square_slope = _mm512_set1_ps(0.21406445f);  // of 2 u'
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 mask = lanes(count - i);
    const __m512 value = T::load(x + i * T::kBytes, mask), square = _mm512_mul_ps(value, value);
    __m512 exponent = _mm512_mul_ps(value, _mm512_fmadd_ps(square, cubic, linear));
    exponent = _mm512_min_ps(_mm512_max_ps(exponent, _mm512_sub_ps(_mm512_setzero_ps(), limit)), limit);
    const __m512 e = exp2<T>(_mm512_sub_ps(_mm512_setzero_ps(), exponent));
    const __m512 sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, e));
    __m512 result = _mm512_mul_ps(value, sigmoid);
    if (grad) {
      const __m512 inner = _mm512_fmadd_ps(square, square_slope, slope);
      const __m512 rest = _mm512_mul_ps(result, _mm512_mul_ps(_mm512_mul_ps(e, sigmoid), inner));  // 1 - s = e s
      result = _mm512_mul_ps(T::load(grad + i * T::kBytes, mask), _mm512_add_ps(sigmoid, rest));
    }
    T::store(out + i * T::kBytes, mask, result);
  }
}

}  // namespace
}  // namespace vlmteacher::elementwise
