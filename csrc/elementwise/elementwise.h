// Element-wise work of transformers for processors with AVX-512, arithmetic in float32. The definitions are in
// vlmteacher/ops/elementwise.py.
#pragma once
#include <cstdint>

#include "../processor.h"

namespace vlmteacher::elementwise {

// Of one token: x (heads, 2 * width), its rows `stride` bytes apart, -> out, contiguous. cos, sin: (width,); `back`
// rotates the other way.
using Rotate = void(bool back, int64_t heads, int64_t width, const char* x, int64_t stride, const float* cos,
                    const float* sin, char* out);
FOR_SOME_PROCESSORS Rotate rotate_float32, rotate_bfloat16_avx512, rotate_bfloat16_avx512bf16;

// out = gelu(x), the approximation by tanh; where `grad` is not null, out = grad * gelu'(x).
using Gelu = void(int64_t count, const char* x, const char* grad, char* out);
FOR_SOME_PROCESSORS Gelu gelu_float32, gelu_bfloat16_avx512, gelu_bfloat16_avx512bf16;

}  // namespace vlmteacher::elementwise
