// Every kernel that plan.cuh launches, for `nvcc -cubin`, which reports registers and spills without torch.
#include "kernels.cuh"

namespace patchify {

// The compile table (benchmarks/static) reads what a launch asks for from these lines; of a resize it is
// what halving a frame takes.
// launch copy< 256 0
// launch resize< 256 8704
// launch shuffle< 256 0

#define KERNELS(FROM, TO)                                                     \
  template __global__ void copy(const __grid_constant__ Work<FROM, TO>, int); \
  template __global__ void resize(const __grid_constant__ Work<FROM, TO>, int, int)

#define TYPES(T, OUT)                                                              \
  KERNELS(Pixels<const T>, Rows<OUT>);                                             \
  KERNELS(Rows<const T>, Pixels<OUT>);                                             \
  template __global__ void shuffle(const __grid_constant__ Shuffle<const T, OUT>); \
  template __global__ void unshuffle(const __grid_constant__ Shuffle<OUT, const T>)

#define FROM(T)     \
  TYPES(T, float);  \
  TYPES(T, __half); \
  TYPES(T, __nv_bfloat16)

FROM(float);
FROM(__half);
FROM(__nv_bfloat16);

}  // namespace patchify
