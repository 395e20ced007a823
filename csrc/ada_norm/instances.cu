// Every kernel that plan.cuh launches, for `nvcc -cubin`, which reports registers and spills without torch.
#include "kernels.cuh"

namespace ada_norm {

// The compile table (benchmarks/static) reads threads, for 3072 channels, and shared memory of launches here.
// launch forward< 192 0
// launch backward< 192 0

#define KERNELS(T, N)                                                         \
  template __global__ void forward<T, N>(const __grid_constant__ Forward<T>); \
  template __global__ void backward<T, N>(const __grid_constant__ Backward<T>)

#define PACKS(T)              \
  KERNELS(T, 16 / sizeof(T)); \
  KERNELS(T, 1)

PACKS(float);
PACKS(__half);
PACKS(__nv_bfloat16);

}  // namespace ada_norm
