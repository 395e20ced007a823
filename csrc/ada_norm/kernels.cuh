// Device code of the gated residual, LayerNorm and modulation; the definition is vlmteacher/ops/ada_norm.py. A block to
// a token, which stays in registers: every tensor is read or written once. No torch here: nvcc compiles this file
// alone, and the tests execute it on the CPU.
#pragma once

#include "../row.cuh"

namespace ada_norm {

using row::Row;

struct Sizes {  // as in rows.h
  int tokens, width, first, batches, rows;

  __device__ int64_t table_row(int token) const {
    const int item = batches == 1 ? 0 : token / tokens;
    return int64_t{item * rows + (token % tokens < first ? 0 : rows - 1)} * width;
  }
};

template <class T>
struct Forward {  // null pointers: absent
  Sizes sizes;
  float eps;
  const T *x, *y;
  const float *gate, *weight, *bias;
  T *out, *norm;
};

template <class T>
struct Backward {
  Sizes sizes;
  float eps;
  const T *grad_out, *grad_norm, *kept;
  const float *gate, *weight;
  T *dx, *dy;
};

// The row about its mean (zeros beyond the width); returns 1 / its standard deviation.
template <int N>
__device__ float centre(Row<N>& v, int width, float eps) {
  const float mean = row::sum_of(v) / width;
  float squares[1] = {};
  Row<N>::packs(width, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      v.v[i + j] -= mean;
      squares[0] += v.v[i + j] * v.v[i + j];
    }
  });
  row::block_sums(squares);
  return 1 / sqrtf(squares[0] / width + eps);
}

template <class T, int N>
__global__ void __launch_bounds__(row::MostThreads) forward(const __grid_constant__ Forward<T> f) {
  const int width = f.sizes.width;
  const int64_t at = int64_t{blockIdx.x} * width, table = f.sizes.table_row(blockIdx.x);
  auto v = Row<N>::load(f.x + at, width);
  if (f.y) {
    auto y = Row<N>::load(f.y + at, width);
    if (f.gate) y.combine([](float a, float b) { return a * b; }, Row<N>::load(f.gate + table, width));
    // rounded before it is normalised, as in the definition
    v.combine([](float a, float b) { return static_cast<float>(T(a + b)); }, y);
    v.store(f.out + at, width);
  }
  if (!f.weight) return;
  const float scale = centre(v, width, f.eps);
  v.combine([&](float a, float weight, float bias) { return a * scale * weight + bias; },
            Row<N>::load(f.weight + table, width), Row<N>::load(f.bias + table, width));
  v.store(f.norm + at, width);
}

template <class T, int N>
__global__ void __launch_bounds__(row::MostThreads) backward(const __grid_constant__ Backward<T> f) {
  const int width = f.sizes.width;
  const int64_t at = int64_t{blockIdx.x} * width, table = f.sizes.table_row(blockIdx.x);
  Row<N> grad;
  if (f.weight) {
    grad = Row<N>::load(f.grad_norm + at, width);
    grad.combine([](float a, float b) { return a * b; }, Row<N>::load(f.weight + table, width));
    auto v = Row<N>::load(f.kept + at, width);
    const float scale = centre(v, width, f.eps);
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < row::Values; ++i) {
      sums[0] += grad.v[i];
      sums[1] += grad.v[i] * v.v[i];
    }
    row::block_sums(sums);
    const float mean = sums[0] / width, along = sums[1] * scale * scale / width;
    grad.combine([&](float a, float b) { return (a - mean - b * along) * scale; }, v);
    if (f.grad_out) grad.combine([](float a, float b) { return a + b; }, Row<N>::load(f.grad_out + at, width));
  } else {
    grad = Row<N>::load(f.grad_out + at, width);
  }
  if (f.dx) grad.store(f.dx + at, width);
  if (!f.dy) return;
  grad.combine([](float a, float b) { return a * b; }, Row<N>::load(f.gate + table, width));
  grad.store(f.dy + at, width);
}

}  // namespace ada_norm
