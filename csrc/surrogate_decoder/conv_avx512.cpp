// The convolutions for AVX-512; called only on processors that have it.
#include "conv_float32.h"

namespace vlmteacher::surrogate_decoder {

Kernels float32_avx512() { return kernels<float>(); }
Kernels bfloat16_avx512() { return kernels<BFloat16>(); }

}  // namespace vlmteacher::surrogate_decoder
