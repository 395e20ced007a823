// Every kernel that plan.cuh launches, for `nvcc -cubin`, which reports registers and spills without torch.
#include "kernels.cuh"

namespace lora_linear {

// The compile table (benchmarks/static) reads threads and shared memory of launches here; the assertions check them.
// launch gemm<float,.*0,0> 256 40960
// launch gemm<float,.*0,1> 256 37888
// launch gemm<float,.*1,1> 256 34816
// launch gemm<.*Tile<128,.*0,0> 256 81920
// launch gemm<.*Tile<128,.*0,1> 256 75776
// launch gemm<.*Tile<64,.*0,0> 128 40960
// launch gemm<.*Tile<64,.*0,1> 128 38912
// launch gemm<.*Tile<64,.*1,1> 128 36864
// launch add_parts 256 0
constexpr int Shared[2][2][3] = {{{40960, 37888, 34816}, {40960, 37888, 34816}},   // float: narrow, wide
                                 {{40960, 38912, 36864}, {81920, 75776, 69632}}};  // 16 bits: narrow, wide
template <class T, class Tile, Along LeftAxis, Along RightAxis>
constexpr bool as_listed = shared_bytes<T, Tile, LeftAxis, RightAxis>() ==
                               Shared[sizeof(T) == 2][std::is_same_v<Tile, Wide<T>>][int(LeftAxis) + int(RightAxis)] &&
                           Tile::Threads == (sizeof(T) == 2 && std::is_same_v<Tile, Narrow<T>> ? 128 : 256);

#define GEMM(T, OUT, TILE, LEFT, RIGHT)                            \
  static_assert(as_listed<T, TILE<T>, Along::LEFT, Along::RIGHT>); \
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
