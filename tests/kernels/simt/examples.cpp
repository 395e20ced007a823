// Tiny kernels, one for each thing that the shim executes and for each fault that it finds (test_simt.py).
#include <../../../csrc/ptx.cuh>

namespace {

constexpr unsigned All = 0xffffffff;

// out[block][thread]: the sum over the block, by shuffles, static shared memory and barriers.
__global__ void block_sum(const float* in, float* out) {
  __shared__ float sums[32];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = in[i];
  for (int by = 16; by; by /= 2) sum += __shfl_down_sync(All, sum, by);
  if (!lane) sums[warp] = sum;
  __syncthreads();
  if (!warp) {
    sum = lane < blockDim.x / 32 ? sums[lane] : 0.f;
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(All, sum, bits);
    if (!lane) sums[0] = sum;
  }
  __syncthreads();
  out[i] = sums[0];
}

// Even and odd lanes apart, each with its own mask: the least lane's value, and the votes for a positive one.
__global__ void halves(const int* in, int* out) {
  const int lane = threadIdx.x, value = in[lane];
  if (lane % 2) {
    out[lane] = __shfl_sync(0xaaaaaaaa, value, 1);
    out[32 + lane] = static_cast<int>(__ballot_sync(0xaaaaaaaa, value > 0));
  } else {
    out[lane] = __shfl_up_sync(0x55555555, value, 2);
    out[32 + lane] = __any_sync(0x55555555, value > 0) + 2 * __all_sync(0x55555555, value > 0);
  }
  __syncwarp();
}

__global__ void histogram(const int* in, int* out, int* most) {
  atomicAdd(&out[in[blockIdx.x * blockDim.x + threadIdx.x]], 1);
  atomicMax(most, in[blockIdx.x * blockDim.x + threadIdx.x]);
}

// One warp: out (16 x 8) = left (16 x 16) right (16 x 8), read by cp.async, transposed by ldmatrix where stored so.
template <class T>
__global__ void product(const T* left, const T* right, float* out, bool wait) {
  T* shared = reinterpret_cast<T*>(ptx::dynamic_shared());
  const int lane = threadIdx.x;
  ptx::copy_async(shared + lane * 8, left + lane * 8, 16);
  ptx::copy_async(shared + 256 + lane * 8, right + (lane < 16 ? lane * 8 : 0), lane < 16 ? 16 : 0);
  ptx::copy_async_commit();
  if (wait) ptx::copy_async_wait<0>();
  __syncwarp();
  uint32_t a[4], b[4];
  float sum[4] = {};
  ptx::ldmatrix<false>(a, shared + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix<true>(b, shared + 256 + lane * 8);
  ptx::mma<T>(sum, a, {b[0], b[1]});
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// Each thread reads what its neighbour wrote; `barrier` is what makes that right.
__global__ void neighbour(const float* in, float* out, bool barrier) {
  float* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  shared[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 33) % blockDim.x];
}

template <class T>  // where g++ treats static variables in another way than in a function
__global__ void static_poison(T* out) {
  __shared__ T values[64];
  if (threadIdx.x < 8) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

// clang-format off: a list
enum Mistake {
  TwoBarriers, ExitBeforeBarrier, SharedBeyond, SharedBefore, LdmatrixBeyond, LdmatrixUnaligned, CopyBeyond,
  StaticBeyond, NotInMask, AnotherMask, ExitBeforeCollective, BarrierInsteadOfCollective, FromOutsideOfTheMask,
  BufferBeyondRead, BufferBeyondWrite, Unaligned, NullPointer, NoFault,
};
// clang-format on

__global__ void mistaken(Mistake mistake, float* buffer, int size) {
  __shared__ float fixed[16];
  float* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int thread = threadIdx.x;
  uint32_t matrix[4];
  switch (mistake) {
    case TwoBarriers:
      if (thread < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case ExitBeforeBarrier:
      if (thread == 3) return;
      __syncthreads();
      break;
    case SharedBeyond:
      shared[256 + thread] = 1;
      break;
    case SharedBefore:
      shared[-1 - thread] = 1;
      break;
    case LdmatrixBeyond:
      ptx::ldmatrix<false>(matrix, shared + 4 * (thread + 40));
      break;
    case LdmatrixUnaligned:
      ptx::ldmatrix<false>(matrix, shared + thread);
      break;
    case CopyBeyond:
      ptx::copy_async(shared + 256, buffer, 16);
      break;
    case StaticBeyond:
      buffer[0] = fixed[thread];
      break;
    case NotInMask:
      __shfl_sync(0xff, thread, 0);
      break;
    case AnotherMask:
      __shfl_sync(thread % 2 ? All : All - 1, thread, 1);
      break;
    case ExitBeforeCollective:
      if (thread == 3) return;
      __syncwarp();
      break;
    case BarrierInsteadOfCollective:
      if (thread == 3) __syncthreads();
      __syncwarp();
      break;
    case FromOutsideOfTheMask:
      if (thread < 16) __shfl_sync(0xffff, thread, 20);
      break;
    case BufferBeyondRead:
      buffer[0] = buffer[size];
      break;
    case BufferBeyondWrite:
      buffer[-1] = 1;
      break;
    case Unaligned:
      *reinterpret_cast<double*>(buffer + 1) = 1;
      break;
    case NullPointer:
      *static_cast<volatile float*>(nullptr) = 1;
      break;
    case NoFault:
      break;
  }
}

}  // namespace

extern "C" {

const char* run_block_sum(const float* in, float* out, int blocks, int threads) {
  return simt::attempt([=] { simt::launch(blocks, threads, 0, [=] { block_sum(in, out); }); });
}

const char* run_halves(const int* in, int* out) {
  return simt::attempt([=] { simt::launch(1, 32, 0, [=] { halves(in, out); }); });
}

const char* run_histogram(const int* in, int* out, int* most, int blocks, int threads) {
  return simt::attempt([=] { simt::launch(blocks, threads, 0, [=] { histogram(in, out, most); }); });
}

const char* run_product(const void* left, const void* right, float* out, bool half, bool wait) {
  return simt::attempt([=] {
    simt::launch(1, 32, 2 * (256 + 256), [=] {
      if (half)
        product(static_cast<const __half*>(left), static_cast<const __half*>(right), out, wait);
      else
        product(static_cast<const __nv_bfloat16*>(left), static_cast<const __nv_bfloat16*>(right), out, wait);
    });
  });
}

const char* run_neighbour(const float* in, float* out, int threads, bool barrier) {
  return simt::attempt([=] { simt::launch(1, threads, 4 * threads, [=] { neighbour(in, out, barrier); }); });
}

const char* run_static_poison(float* out) {
  return simt::attempt([=] { simt::launch(1, 64, 0, [=] { static_poison(out); }); });
}

const char* run_mistaken(int mistake, float* buffer, int size) {
  return simt::attempt(
      [=] { simt::launch(1, 64, 1024, [=] { mistaken(static_cast<Mistake>(mistake), buffer, size); }); });
}
}
