// attention for AVX-512, called only on processors that have it.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include "attention_avx512.h"

namespace vlmteacher::attention {

Kernels float32_avx512() { return kernels<Float32>(); }
Kernels bfloat16_avx512() { return kernels<BFloat16>(); }

}  // namespace vlmteacher::attention
#endif
