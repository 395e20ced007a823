// Every kernel that plan.cuh launches, for `nvcc -cubin`: what the compiler makes of them can be read without torch.
#include "kernels.cuh"

namespace lora_linear {

#define GEMM(T, OUT, TILE, LEFT, RIGHT) \
  template __global__ void gemm<T, OUT, TILE<T>, Along::LEFT, Along::RIGHT>(const __grid_constant__ Gemm<T, OUT>)

#define KERNELS(T)                                 \
  GEMM(T, T, Narrow, Depth, Depth);   /* S */      \
  GEMM(T, T, Narrow, Depth, Side);    /* dS */     \
  GEMM(T, float, Narrow, Side, Side); /* dA, dB */ \
  template __global__ void add_parts<T>(const float*, int64_t, int, T*, int64_t)

#define TENSOR_CORE_KERNELS(T)             \
  GEMM(T, T, Wide, Depth, Depth); /* y */  \
  GEMM(T, T, Wide, Depth, Side);  /* dx */ \
  KERNELS(T)

TENSOR_CORE_KERNELS(__nv_bfloat16);
TENSOR_CORE_KERNELS(__half);
KERNELS(float);  // whose two tiles are the same

}  // namespace lora_linear
