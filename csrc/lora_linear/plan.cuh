// Which kernels compute the LoRA linear, in which order: host code, templated on what a `Device` is, so that the
// tests drive the CPU through the very same launches. A Device has
//   launch(kernel, grid, threads, shared_bytes, arguments...), one after the other;
//   scratch<T>(count), memory that lives until the launches are done;
//   copy(to, from, count), in the same order.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.cuh"

namespace lora_linear {

template <class T>
struct Layer {                                   // null: not wanted, or no bias
  const T *weight = nullptr, *bias = nullptr;    // (n, k), (n)
  const T *lora_a = nullptr, *lora_b = nullptr;  // (rank, k), (n, rank)
  const T* grad = nullptr;                       // (m, n)
  T *y = nullptr, *da = nullptr, *db = nullptr;  // as the gradient, lora_a and lora_b
  int n, rank;
  float scaling;
};

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

template <class T>
int total_rank(const std::vector<Layer<T>>& layers) {
  int sum = 0;
  for (const auto& layer : layers) sum += layer.rank;
  return sum;
}

template <class Tile, Along LeftAxis, Along RightAxis, class T, class Out, class Device>
void launch(Device& device, const Gemm<T, Out>& g, int parts = 1) {
  if (const int tiles = divide_up(g.m, Tile::M) * divide_up(g.n, Tile::N))
    device.launch(gemm<T, Out, Tile, LeftAxis, RightAxis>, dim3(tiles, parts), Tile::Threads,
                  shared_bytes<T, Tile, LeftAxis, RightAxis>(), g);
}

template <class T>
void add(Gemm<T, T>& g, const Product<T>& product) {
  if (product.depth) g.products[g.count++] = product;
}

// Every A below one another, (R, k): what the layers do with the same x, or add to the same dx, is one product.
template <class T, class Device>
const T* stack_lora_a(Device& device, const std::vector<Layer<T>>& layers, int k) {
  if (layers.size() == 1) return layers[0].lora_a;
  T* const stacked = device.template scratch<T>(int64_t{total_rank(layers)} * k);
  T* to = stacked;
  for (const auto& layer : layers) {
    device.copy(to, layer.lora_a, int64_t{layer.rank} * k);
    to += int64_t{layer.rank} * k;
  }
  return stacked;
}

// s (m, R) = x A^T, then y = x W^T + b + scaling S B^T of each layer.
template <class T, class Device>
void forward(Device& device, const T* x, int m, int k, const std::vector<Layer<T>>& layers, T* s) {
  const int ranks = total_rank(layers);
  Gemm<T, T> down{.out = s, .out_stride = ranks, .m = m, .n = ranks};
  add(down, {x, stack_lora_a(device, layers, k), k, k, k});
  launch<Narrow<T>, Along::Depth, Along::Depth>(device, down);
  for (const auto& layer : layers) {
    Gemm<T, T> up{
        .scale = layer.scaling, .bias = layer.bias, .out = layer.y, .out_stride = layer.n, .m = m, .n = layer.n};
    add(up, {s, layer.lora_b, ranks, layer.rank, layer.rank});
    add(up, {x, layer.weight, k, k, k});
    launch<Wide<T>, Along::Depth, Along::Depth>(device, up);
    s += layer.rank;
  }
}

// left^T right, a sum over m rows: in parts, as its result alone has too few tiles to occupy a GPU, and in float until
// the parts are added. The parts depend on nothing but the shape.
template <class T>
struct SumOverRows {
  const float* parts;
  int64_t size;
  int count;

  template <class Device>
  SumOverRows(Device& device, const T* left, int n_left, int left_stride, const T* right, int n_right, int right_stride,
              int m, float scale) {
    using Tile = Narrow<T>;
    constexpr int Blocks = 256, FewestRows = 256;
    const int tiles = std::max(1, divide_up(n_left, Tile::M) * divide_up(n_right, Tile::N));
    const int rows = std::max(FewestRows, divide_up(m, divide_up(Blocks, tiles)));
    Gemm<T, float> g{.scale = scale, .out_stride = n_right, .m = n_left, .n = n_right};
    if (m) g.products[g.count++] = {left, right, left_stride, right_stride, m};
    g.split_stride = size = int64_t{n_left} * n_right;
    g.chunk = divide_up(rows, Tile::Depth) * Tile::Depth;
    count = std::max(1, divide_up(m, g.chunk));
    parts = g.out = device.template scratch<float>(count * size);
    launch<Tile, Along::Side, Along::Side>(device, g, count);
  }

  template <class Device>
  void store(Device& device, int64_t from, T* out, int64_t elements) const {
    if (const int64_t blocks = (elements + 255) / 256)
      device.launch(add_parts<T>, dim3(std::min<int64_t>(blocks, 1024)), 256, 0, parts + from, size, count, out,
                    elements);
  }
};

// dx, dA and dB of each layer from the gradients dy of the layers; dx is null where not wanted, as is any da or db.
template <class T, class Device>
void backward(Device& device, const T* x, const T* s, int m, int k, const std::vector<Layer<T>>& layers, T* dx,
              bool need_a, bool need_b) {
  const int ranks = total_rank(layers);
  T* const ds = dx || need_a ? device.template scratch<T>(int64_t{m} * ranks) : nullptr;
  int start = 0;
  for (const auto& layer : layers) {
    if (ds) {
      Gemm<T, T> down{.scale = layer.scaling, .out = ds + start, .out_stride = ranks, .m = m, .n = layer.rank};
      add(down, {layer.grad, layer.lora_b, layer.n, layer.rank, layer.n});
      launch<Narrow<T>, Along::Depth, Along::Side>(device, down);
    }
    if (need_b)
      SumOverRows<T>(device, layer.grad, layer.n, layer.n, s + start, layer.rank, ranks, m, layer.scaling)
          .store(device, 0, layer.db, int64_t{layer.n} * layer.rank);
    start += layer.rank;
  }
  if (dx) {
    Gemm<T, T> up{.out = dx, .out_stride = k, .m = m, .n = k};
    add(up, {ds, stack_lora_a(device, layers, k), ranks, k, ranks});
    for (const auto& layer : layers) add(up, {layer.grad, layer.weight, layer.n, k, layer.n});
    launch<Wide<T>, Along::Depth, Along::Side>(device, up);
  }
  if (need_a) {
    const SumOverRows<T> sum(device, ds, ranks, ranks, x, k, k, m, 1);
    int64_t from = 0;
    for (const auto& layer : layers) {
      sum.store(device, from, layer.da, int64_t{layer.rank} * k);
      from += int64_t{layer.rank} * k;
    }
  }
}

}  // namespace lora_linear
