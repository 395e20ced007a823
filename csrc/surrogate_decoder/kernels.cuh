// Device code of the surrogate decoder's convolutions; the definition is vlmteacher/ops/surrogate_decoder.py, the order
// of launches plan.cuh.
//
// One implicit matrix product serves both directions: a block owns a rectangle of one frame's pixels and a run of
// channels, and adds up, place by place of the kernel, what it reads at the shifted rectangle times that place's
// weights. Forward it reads the frames of `taps`, backward the gradient of the outputs that saw its frame. Behind
// nearest upsampling the weights are folded to 4 x 4, see fold(): forward a block owns every second row and column of
// the output and has 2 x 2 places, backward it has 4 x 4. No two blocks write the same element.
#pragma once

#include "../mma_tile.cuh"

namespace surrogate_decoder {

using namespace mma_tile;

// By the number of the result's channels.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, float>, Tile<64, 64, 16, 2, 4>, Tile<128, 128, 32, 2, 4>>;
using Middle = Tile<128, 64, 32, 4, 2>;
using Thin = Tile<128, 16, 32, 4, 1>;
constexpr int Across = 16;  // pixels in a row of the rectangle

template <class T>
struct Conv {
  // what is read, and (columns, side, side, taps depth), backward (depth, side, side, taps columns), side = 2 + upscale
  const T *from, *weight;
  const T* bias = nullptr;  // (columns), or none
  const int* frames;        // (frames of out, taps): which frames of `from` a frame of `out` reads, or -1
  // What is added: a bank of frames like those of `out`, of which rows[frame] is the frame's, or none where negative;
  // backward with signs of its own. Or none.
  const T* residual = nullptr;
  const int* rows = nullptr;
  int rows_stride = 1;
  const uint8_t* residual_signs = nullptr;
  T* out;
  // a bit for every element of y: forward written, backward read with `from`; null without an activation
  uint8_t* signs;
  int taps, depth, columns;
  int height, width, upscale;  // of the frames of x, and of dx; those of y and of its gradient are larger by `upscale`
  float slope;
};

template <class T>
struct alignas(16) Vector {
  static constexpr int Size = 16 / sizeof(T);
  T element[Size];
};

__device__ inline float with_slope(float value, bool positive, float slope) { return positive ? value : slope * value; }

// The part of the gradient that a thread reads for one tile: loaded into registers while the block multiplies another.
template <class T, class Tile>
struct Staged {
  using Left = Operand<T, Along::Depth, Tile::M, Tile::Depth>;
  static constexpr int PerRow = Tile::Depth / Vector<T>::Size, Count = Tile::M * PerRow / Tile::Threads;
  static_assert(Count * Tile::Threads == Tile::M * PerRow);
  Vector<T> value[Count];
  unsigned positive[Count];

  __device__ void store(T* shared, float slope) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const int at = threadIdx.x + i * Tile::Threads;
      Vector<T> masked;
#pragma unroll
      for (int j = 0; j < Vector<T>::Size; ++j)
        masked.element[j] =
            positive[i] >> j & 1 ? value[i].element[j] : T(slope * static_cast<float>(value[i].element[j]));
      *reinterpret_cast<Vector<T>*>(shared + at / PerRow * Left::Pitch + at % PerRow * Vector<T>::Size) = masked;
    }
  }
};

// Grid: (tiles of a frame's pixels x tiles of columns, frames of out; forward times upscale^2). Dynamic shared memory:
// shared_bytes().
template <class T, class Tile, bool Backward>
__global__ void __launch_bounds__(Tile::Threads, 2) conv(const __grid_constant__ Conv<T> p) {
  using Left = Operand<T, Along::Depth, Tile::M, Tile::Depth>;
  using Right = Operand<T, Backward ? Along::Side : Along::Depth, Tile::N, Tile::Depth>;
  using Load = Staged<T, Tile>;
  constexpr int Size = Vector<T>::Size;
  T* const shared = reinterpret_cast<T*>(ptx::dynamic_shared());
  const auto left_tile = [&](int stage) { return shared + stage % Tile::Stages * (Left::Elements + Right::Elements); };
  const auto right_tile = [&](int stage) { return left_tile(stage) + Left::Elements; };

  // Blocks that run together share pixels, the larger operand.
  const int columns = (p.columns + Tile::N - 1) / Tile::N, rectangles = (p.width + Across - 1) / Across;
  const int column = blockIdx.x % columns * Tile::N;
  const int row = blockIdx.x / columns / rectangles * (Tile::M / Across);
  const int first = blockIdx.x / columns % rectangles * Across;

  const int part = Backward ? 1 : p.upscale;  // forward, the output's rows and columns a + part i and b + part j
  const int frame_out = blockIdx.y / (part * part), a = blockIdx.y / part % part, b = blockIdx.y % part;
  const int* const frames = p.frames + frame_out * p.taps;
  const int stored = 2 + p.upscale, side = Backward ? stored : 4 - p.upscale, scale = Backward ? p.upscale : 1;
  const int from_height = p.height * scale, from_width = p.width * scale, channels = Backward ? p.columns : p.depth;
  const int64_t from_pixels = int64_t{from_height} * from_width;
  const int64_t weight_stride = int64_t{stored} * stored * p.taps * channels;
  const int sign_bytes = ((Backward ? p.depth : p.columns) + 7) / 8;
  const bool aligned = p.depth % Size == 0 && reinterpret_cast<uintptr_t>(p.from) % 16 == 0;

  int all_steps = 0;
  for (int tap = 0; tap < p.taps; ++tap)
    if (frames[tap] >= 0) all_steps += side * side * ((p.depth + Tile::Depth - 1) / Tile::Depth);

  int tap = 0, down = 0, right = 0, depth = 0;  // the next to be read: the place is (down, right) of the kernel
  Load staged;
  const auto read = [&](int step) {
    if (step < all_steps) {
      while (frames[tap] < 0) ++tap;
      const int64_t frame = frames[tap] * from_pixels;
      const int place = (a + part * down) * stored + b + part * right;
      Right::template load<Tile::Threads>(right_tile(step), p.weight + (place * p.taps + tap) * int64_t{channels},
                                          weight_stride, column, p.columns, depth, p.depth);
#pragma unroll
      for (int i = 0; i < Load::Count; ++i) {
        const int at = threadIdx.x + i * Tile::Threads, pixel = at / Load::PerRow, x = at % Load::PerRow * Size;
        int y_at = row + pixel / Across, x_at = first + pixel % Across;
        y_at = Backward ? y_at * scale + side - 2 - down : y_at + down - 1 + a;
        x_at = Backward ? x_at * scale + side - 2 - right : x_at + right - 1 + b;
        const bool inside = y_at >= 0 && x_at >= 0 && y_at < from_height && x_at < from_width;
        const int real = inside ? max(0, min(Size, p.depth - depth - x)) : 0;
        const int64_t from_pixel = real ? frame + y_at * from_width + x_at : 0;
        const T* from = p.from + (real ? from_pixel * p.depth + depth + x : 0);
        T* to = left_tile(step) + pixel * Left::Pitch + x;
        if constexpr (Backward) {
          staged.positive[i] =
              real && p.signs ? p.signs[from_pixel * sign_bytes + (depth + x) / 8] >> (depth + x) % 8 : 0xff;
          if (aligned && real) {
            staged.value[i] = *reinterpret_cast<const Vector<T>*>(from);
          } else {
#pragma unroll
            for (int j = 0; j < Size; ++j) staged.value[i].element[j] = j < real ? from[j] : T(0.f);
          }
        } else if (aligned) {
          ptx::copy_async(to, from, real * sizeof(T));
        } else {
#pragma unroll
          for (int j = 0; j < Size; ++j) to[j] = j < real ? from[j] : T(0.f);
        }
      }
      depth += Tile::Depth;
      if (depth >= p.depth) depth = 0, ++right;
      if (right == side) right = 0, ++down;
      if (down == side) down = 0, ++tap;
    }
    ptx::copy_async_commit();
  };
  const auto store_staged = [&](int step) {
    if constexpr (Backward)
      if (step < all_steps) staged.store(left_tile(step), p.slope);
  };

  Accumulators<T, Tile, Left, Right> sum;
  for (int step = 0; step < Tile::Stages - 1; ++step) {
    read(step);
    store_staged(step);
  }
  for (int step = 0; step < all_steps; ++step) {
    ptx::copy_async_wait<Tile::Stages - 2>();
    __syncthreads();  // this step's tiles are complete, and no thread reads the last step's, which are overwritten now
    read(step + Tile::Stages - 1);
    sum.add(left_tile(step), right_tile(step));
    store_staged(step + Tile::Stages - 1);
  }

  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  const bool paired = p.columns % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % sizeof(Pair) == 0;
  const int out_width = p.width * part;
  const int64_t out_pixels = int64_t{p.height} * part * out_width;
  const int added = p.residual ? p.rows[frame_out * p.rows_stride] : -1;
  sum.for_each_pair([&](int j, const auto& rows) {
    j += column;
    const bool any = j < p.columns, both = j + 1 < p.columns;
    const float first_bias = p.bias && any ? static_cast<float>(p.bias[j]) : 0.f;
    const float second_bias = p.bias && both ? static_cast<float>(p.bias[j + 1]) : 0.f;
    rows([&](int i, float one, float two) {
      const int y_at = row + i / Across, x_at = first + i % Across;
      const int pixel = (y_at * part + a) * out_width + x_at * part + b;
      const bool inside = y_at < p.height && x_at < p.width;
      one += first_bias, two += second_bias;
      if (added >= 0 && inside && any) {
        const int64_t at = added * out_pixels + pixel;
        const T* from = p.residual + at * p.columns + j;
        float add_one = from[0], add_two = both ? static_cast<float>(from[1]) : 0.f;
        if (Backward && p.residual_signs) {
          const unsigned positive = p.residual_signs[at * ((p.columns + 7) / 8) + j / 8] >> j % 8;
          add_one = with_slope(add_one, positive & 1, p.slope), add_two = with_slope(add_two, positive & 2, p.slope);
        }
        one += add_one, two += add_two;
      }
      const int64_t to_pixel = frame_out * out_pixels + pixel;
      if (!Backward && p.signs) {
        // four neighbours hold the eight columns of a byte; beyond the last column everything is zero
        unsigned bits = ((one > 0) | (two > 0) << 1) << j % 8;
        bits |= __shfl_xor_sync(0xffffffff, bits, 1);
        bits |= __shfl_xor_sync(0xffffffff, bits, 2);
        if (inside && any && j % 8 == 0) p.signs[to_pixel * sign_bytes + j / 8] = static_cast<uint8_t>(bits);
        one = with_slope(one, one > 0, p.slope), two = with_slope(two, two > 0, p.slope);
      }
      if (!inside || !any) return;
      T* const to = p.out + to_pixel * p.columns + j;
      if (paired) {
        *reinterpret_cast<Pair*>(to) = {T(one), T(two)};
      } else {
        to[0] = T(one);
        if (both) to[1] = T(two);
      }
    });
  });
}

// The inverse of taps (outputs, count): users (frames, count), the output that reads a frame as that tap, or -1. A
// block.
__global__ void __launch_bounds__(256) invert(const int* taps, int outputs, int count, int frames, int* users) {
  for (int i = threadIdx.x; i < frames * count; i += 256) users[i] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < outputs * count; i += 256)
    if (taps[i] >= 0) users[taps[i] * count + i % count] = i / count;
}

// The weights (n, 3, 3, channels) of a convolution behind nearest x2 upsampling as those of a transposed one of stride
// 2, (n, 4, 4, channels). Rows 2 i and 2 i + 1 of what it reads are row i of the input: so input row i meets output row
// 2 i + 2 - q with the sum of the weights' rows q and q - 1, of those that exist; columns alike.
template <class T>
__global__ void __launch_bounds__(256) fold(const T* weight, int64_t size, int channels, T* out) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < size; i += gridDim.x * int64_t{256}) {
    const int64_t c = i % channels, n = i / channels / 16;
    const int right = i / channels % 4, down = i / channels / 4 % 4;
    float sum = 0;
    for (int y = max(0, down - 1); y <= min(2, down); ++y)
      for (int x = max(0, right - 1); x <= min(2, right); ++x)
        sum += static_cast<float>(weight[((n * 3 + y) * 3 + x) * channels + c]);
    out[i] = T(sum);
  }
}

}  // namespace surrogate_decoder
