// Every kernel that plan.cuh launches, for `nvcc -cubin`, which reports registers and spills without torch.
#include "kernels.cuh"

namespace surrogate_decoder {

// The compile table (benchmarks/static) reads threads and shared memory of launches here; the assertions check them.
// launch conv<float,.*false> 256 40960
// launch conv<float,.*true> 256 37888
// launch conv<.*Tile<128,128,.*false> 256 81920
// launch conv<.*Tile<128,128,.*true> 256 75776
// launch conv<.*Tile<128,64,.*false> 256 61440
// launch conv<.*Tile<128,64,.*true> 256 59392
// launch conv<.*Tile<128,16,.*false> 128 46080
// launch conv<.*Tile<128,16,.*true> 128 47104
template <class T, class Tile, int Threads, int Forward, int Backward>
constexpr bool as_listed = Tile::Threads == Threads && shared_bytes<T, Tile, Along::Depth, Along::Depth>() == Forward &&
                           shared_bytes<T, Tile, Along::Depth, Along::Side>() == Backward;
static_assert(as_listed<float, Wide<float>, 256, 40960, 37888>);
static_assert(as_listed<__half, Wide<__half>, 256, 81920, 75776>);
static_assert(as_listed<__half, Middle, 256, 61440, 59392>);
static_assert(as_listed<__half, Thin, 128, 46080, 47104>);

#define CONV(T, TILE)                                                             \
  template __global__ void conv<T, TILE, false>(const __grid_constant__ Conv<T>); \
  template __global__ void conv<T, TILE, true>(const __grid_constant__ Conv<T>)

#define KERNELS(T)  \
  CONV(T, Wide<T>); \
  template __global__ void fold<T>(const T*, int64_t, int, T*)

KERNELS(__nv_bfloat16);
CONV(__nv_bfloat16, Middle);
CONV(__nv_bfloat16, Thin);
KERNELS(__half);
CONV(__half, Middle);
CONV(__half, Thin);
KERNELS(float);

}  // namespace surrogate_decoder
