// A row of a matrix in the registers of a block of threads, for operators that work row by row; knows no torch.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ptx.cuh"

namespace row {

constexpr int Values = 16, MostThreads = 512;  // of a row: in a thread, for a block
constexpr int MostWidth = Values * MostThreads;

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

// N neighbouring elements at a time, which a thread reads and writes together; the row's width is a multiple of N.
template <int N>
struct Row {
  float v[Values];  // zeros beyond the width

  // f(where in `v`, where in the row) of each pack inside the row.
  template <class F>
  __device__ static void packs(int width, const F& f) {
#pragma unroll
    for (int i = 0; i < Values; i += N)
      if (const int first = i * blockDim.x + N * threadIdx.x; first < width) f(i, first);
  }

  template <class T>
  __device__ static Row load(const T* row, int width) {
    Row found;
#pragma unroll
    for (int i = 0; i < Values; ++i) found.v[i] = 0;
    packs(width, [&](int i, int first) {
      const auto pack = *reinterpret_cast<const Pack<T, N>*>(row + first);
#pragma unroll
      for (int j = 0; j < N; ++j) found.v[i + j] = static_cast<float>(pack.v[j]);
    });
    return found;
  }

  template <class T>
  __device__ void store(T* row, int width) const {
    packs(width, [&](int i, int first) {
      Pack<T, N> pack;
#pragma unroll
      for (int j = 0; j < N; ++j) pack.v[j] = T(v[i + j]);
      *reinterpret_cast<Pack<T, N>*>(row + first) = pack;
    });
  }

  // v = f(v, each of `others`)
  template <class F, class... Others>
  __device__ void combine(const F& f, const Others&... others) {
#pragma unroll
    for (int i = 0; i < Values; ++i) v[i] = f(v[i], others.v[i]...);
  }
};

// The sums of the block's values, which every thread gets.
template <int N>
__device__ void block_sums(float (&values)[N]) {
  __shared__ float parts[N][MostThreads / 32];
#pragma unroll
  for (int n = 0; n < N; ++n)
    for (int bits = 16; bits; bits /= 2) values[n] += __shfl_xor_sync(0xffffffff, values[n], bits);
  __syncthreads();  // no thread reads the previous sums any more
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) parts[n][threadIdx.x / 32] = values[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) values[n] += parts[n][warp];
  }
}

template <int N>
__device__ float sum_of(const Row<N>& row) {
  float total[1] = {};
#pragma unroll
  for (int i = 0; i < Values; ++i) total[0] += row.v[i];
  block_sums(total);
  return total[0];
}

// Host: threads for a row, and f with as many elements to a pack as 16 bytes hold, or `Least` where the width is no
// multiple of that.
inline int threads_for(int width) {
  if (width > MostWidth)
    throw std::runtime_error(std::to_string(width) + " channels are more than " + std::to_string(MostWidth));
  return std::max(1, (width + 32 * Values - 1) / (32 * Values)) * 32;
}

template <class T, int Least, class F>
void with_packs(int width, const F& f) {
  constexpr int Most = 16 / sizeof(T);
  if (width % Most == 0)
    f.template operator()<Most>();
  else
    f.template operator()<Least>();
}

}  // namespace row
