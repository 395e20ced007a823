// Element-wise work of transformers for processors with AVX-512 BF16; arithmetic in float32. The definitions are in
// vlmteacher/ops/elementwise.py. `half` means bfloat16, else float32.
#pragma once
#include <cstdint>

namespace vlmteacher::elementwise {

bool available();

// Of one token: x (heads, 2 * width), its rows `stride` bytes apart, -> out, contiguous. cos, sin: (width,); `back`
// rotates the other way.
void rotate(bool half, bool back, int64_t heads, int64_t width, const char* x, int64_t stride, const float* cos,
            const float* sin, char* out);

// out = gelu(x), the approximation by tanh; where `grad` is not null, out = grad * gelu'(x).
void gelu(bool half, int64_t count, const char* x, const char* grad, char* out);

}  // namespace vlmteacher::elementwise
