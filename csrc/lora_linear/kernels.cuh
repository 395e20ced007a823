// Device code of the LoRA linear; the definition is vlmteacher/ops/lora_linear.py, the order of launches plan.cuh.
//
// One matrix product serves every step: a block adds up a list of products left . right in the same accumulators, so
// that the low-rank one (S B^T, dS A) is a few more tiles of the wide one and y-sized data are written once.
#pragma once

#include "../mma_tile.cuh"

namespace lora_linear {

using namespace mma_tile;

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, float>, Tile<64, 64, 16, 2, 4>, Tile<128, 128, 32, 2, 4>>;
template <class T>
using Narrow = std::conditional_t<std::is_same_v<T, float>, Tile<64, 64, 16, 2, 4>, Tile<64, 64, 32, 2, 2>>;

template <class T>
struct Product {  // left (M x depth) . right (depth x N); strides are of the stored rows
  const T *left, *right;
  int64_t left_stride, right_stride;
  int depth;
};

constexpr int MostProducts = 16;

// A block row y of the grid sums over depths [y * chunk, (y + 1) * chunk) only, into its own part of `out`.
template <class T, class Out>
struct Gemm {
  Product<T> products[MostProducts] = {};
  int count = 0;
  float scale = 1;          // of the first product
  const T* bias = nullptr;  // (n), or none
  Out* out = nullptr;
  int64_t out_stride = 0, split_stride = 0;
  int m = 0, n = 0, chunk = 0x7fffffff;
};

// Grid: (tiles of `out`, parts of the sum). Dynamic shared memory: shared_bytes().
template <class T, class Out, class Tile, Along LeftAxis, Along RightAxis>
__global__ void __launch_bounds__(Tile::Threads, 2) gemm(const __grid_constant__ Gemm<T, Out> g) {
  using Left = Operand<T, LeftAxis, Tile::M, Tile::Depth>;
  using Right = Operand<T, RightAxis, Tile::N, Tile::Depth>;
  T* const shared = reinterpret_cast<T*>(ptx::dynamic_shared());
  const auto left_tile = [&](int stage) { return shared + stage % Tile::Stages * (Left::Elements + Right::Elements); };
  const auto right_tile = [&](int stage) { return left_tile(stage) + Left::Elements; };

  // Bands of eight block rows, each walked column by column: blocks that run together meet in few operand tiles, in L2.
  const int down = (g.m + Tile::M - 1) / Tile::M, across = (g.n + Tile::N - 1) / Tile::N;
  const int band = blockIdx.x / (8 * across) * 8, height = min(8, down - band);
  const int row = (band + blockIdx.x % (8 * across) % height) * Tile::M;
  const int column = blockIdx.x % (8 * across) / height * Tile::N;

  const int begin = blockIdx.y * g.chunk;
  const auto end = [&](int product) { return min(g.products[product].depth - begin, g.chunk) + begin; };
  const auto steps = [&](int product) { return (end(product) - begin + Tile::Depth - 1) / Tile::Depth; };
  const int first_steps = g.count ? steps(0) : 0;
  int all_steps = first_steps;
  for (int i = 1; i < g.count; ++i) all_steps += steps(i);

  int product = 0, depth = begin;  // the next to be read
  const auto read = [&](int step) {
    if (step < all_steps) {
      const Product<T>& p = g.products[product];
      Left::template load<Tile::Threads>(left_tile(step), p.left, p.left_stride, row, g.m, depth, end(product));
      Right::template load<Tile::Threads>(right_tile(step), p.right, p.right_stride, column, g.n, depth, end(product));
      depth += Tile::Depth;
      if (depth >= end(product)) ++product, depth = begin;
    }
    ptx::copy_async_commit();
  };

  Accumulators<T, Tile, Left, Right> sum;
  for (int step = 0; step < Tile::Stages - 1; ++step) read(step);
  for (int step = 0; step < all_steps; ++step) {
    ptx::copy_async_wait<Tile::Stages - 2>();
    __syncthreads();  // this step's tiles are complete, and no thread reads the last step's, which are overwritten now
    read(step + Tile::Stages - 1);
    sum.add(left_tile(step), right_tile(step));
    if (step + 1 == first_steps) sum.multiply(g.scale);
  }

  struct alignas(2 * sizeof(Out)) Pair {
    Out first, second;
  };
  Out* const out = g.out + blockIdx.y * g.split_stride;
  const bool aligned = g.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Pair) == 0;
  sum.for_each_pair([&](int j, const auto& rows) {
    j += column;
    if (j >= g.n) return;
    const bool both = j + 1 < g.n;
    const float first_bias = g.bias ? static_cast<float>(g.bias[j]) : 0.f;
    const float second_bias = g.bias && both ? static_cast<float>(g.bias[j + 1]) : 0.f;
    rows([&](int i, float first, float second) {
      i += row;
      if (i >= g.m) return;
      Out* to = out + i * g.out_stride + j;
      if (both && aligned) {
        *reinterpret_cast<Pair*>(to) = {Out(first + first_bias), Out(second + second_bias)};
      } else {
        to[0] = Out(first + first_bias);
        if (both) to[1] = Out(second + second_bias);
      }
    });
  });
}

// out[i] = the sum of the parts at i, i + stride, ..., always in this order: the same bits at every run.
template <class T>
__global__ void __launch_bounds__(256) add_parts(const float* parts, int64_t stride, int count, T* out, int64_t size) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < size; i += gridDim.x * int64_t{256}) {
    float sum = 0;
    for (int part = 0; part < count; ++part) sum += parts[part * stride + i];
    out[i] = T(sum);
  }
}

}  // namespace lora_linear
