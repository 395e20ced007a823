// attention in bfloat16 for AVX-512 BF16, called only on processors that have it.
#if defined(__AVX512BF16__)
#include "attention_avx512.h"

namespace vlmteacher::attention {

Kernels bfloat16_avx512bf16() { return kernels<BFloat16>(); }

}  // namespace vlmteacher::attention
#endif
