// Device code of RMSNorm and rotary position embedding; the definition is vlmteacher/ops/qk_norm_rope.py. A block to a
// token, which stays in registers: every tensor is read or written once. No torch here: nvcc compiles this file alone,
// and the tests execute it on the CPU.
#pragma once

#include "../row.cuh"

namespace qk_norm_rope {

using row::Row;

template <class T>
struct Work {
  int tokens, width, pairs;  // of an item of the batch; pairs of channels of a head
  float eps;
  const T *x, *weight, *grad;  // grad: null forward
  const float *cos, *sin;      // (tokens, pairs), or null: no rotation
  T* out;                      // y, or dx
};

// Each pair of neighbours by the angles of one token, which every head has alike; N is even.
template <int N>
__device__ void turn(Row<N>& row, int width, const float* cos, const float* sin, int pairs, float sign) {
  Row<N>::packs(width, [&](int i, int first) {
    int pair = first / 2 % pairs;
#pragma unroll
    for (int j = i; j < i + N; j += 2) {
      const float c = cos[pair], s = sign * sin[pair], even = row.v[j], odd = row.v[j + 1];
      row.v[j] = even * c - odd * s;
      row.v[j + 1] = even * s + odd * c;
      if (++pair == pairs) pair = 0;
    }
  });
}

template <class T, int N>
__global__ void __launch_bounds__(row::MostThreads) forward(const __grid_constant__ Work<T> w) {
  const int64_t at = int64_t{blockIdx.x} * w.width, angles = int64_t{blockIdx.x % w.tokens} * w.pairs;
  auto v = Row<N>::load(w.x + at, w.width);
  float squares[1] = {};
#pragma unroll
  for (int i = 0; i < row::Values; ++i) squares[0] += v.v[i] * v.v[i];
  row::block_sums(squares);
  const float scale = 1 / sqrtf(squares[0] / w.width + w.eps);
  v.combine([&](float a, float b) { return a * scale * b; }, Row<N>::load(w.weight, w.width));
  if (w.cos) turn(v, w.width, w.cos + angles, w.sin + angles, w.pairs, 1);
  v.store(w.out + at, w.width);
}

template <class T, int N>
__global__ void __launch_bounds__(row::MostThreads) backward(const __grid_constant__ Work<T> w) {
  const int64_t at = int64_t{blockIdx.x} * w.width, angles = int64_t{blockIdx.x % w.tokens} * w.pairs;
  auto grad = Row<N>::load(w.grad + at, w.width);
  if (w.cos) turn(grad, w.width, w.cos + angles, w.sin + angles, w.pairs, -1);
  grad.combine([](float a, float b) { return a * b; }, Row<N>::load(w.weight, w.width));
  const auto v = Row<N>::load(w.x + at, w.width);
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < row::Values; ++i) {
    sums[0] += v.v[i] * v.v[i];
    sums[1] += v.v[i] * grad.v[i];
  }
  row::block_sums(sums);
  const float scale = 1 / sqrtf(sums[0] / w.width + w.eps), along = sums[1] * scale * scale / w.width;
  grad.combine([&](float a, float b) { return (a - b * along) * scale; }, v);
  grad.store(w.out + at, w.width);
}

}  // namespace qk_norm_rope
