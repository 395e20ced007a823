// Device code of resize + normalise + patchify + cast; the definition is vlmteacher/ops/patchify.py, the order of
// launches plan.cuh.
//
// A video is read and written through a layout, Pixels or Rows (the patch rows), so that one kernel serves both
// directions: `resize` adds up rows into shared memory and columns out of it, `copy` is what is left where nothing is
// resized; `shuffle` and `unshuffle` are that `copy` from and to a decoder's last convolution. Every output is written
// by one thread. No torch here: nvcc compiles this file alone, and the tests execute it on the CPU.
#pragma once

#include "../ptx.cuh"

namespace patchify {

template <class T>
struct Pixels {  // (frames, 3, height, width) of any strides
  T* data;
  int64_t frame_stride, channel_stride, y_stride, x_stride;

  __device__ T* at(int frame, int channel, int y, int x) const {
    return data + frame * frame_stride + channel * channel_stride + y * y_stride + x * x_stride;
  }
  __device__ float load(int frame, int channel, int y, int x) const {
    return static_cast<float>(*at(frame, channel, y, x));
  }
  __device__ void store(int frame, int channel, int y, int x, float value) const {
    *at(frame, channel, y, x) = T(value);
  }
};

template <class T>
struct Rows {  // rows over (t, block y, block x, y, x in block), columns over (channel, frame, y, x in patch)
  T* data;
  int patch_height, patch_width, temporal_patch, merge, blocks_x, blocks_y, frames;

  // The first of the frame's slots; the last frame was repeated into what follows in its temporal patch.
  __device__ T* at(int frame, int channel, int y, int x) const {
    const int patch_y = y / patch_height, patch_x = x / patch_width;
    const int64_t block = (int64_t{frame / temporal_patch} * blocks_y + patch_y / merge) * blocks_x + patch_x / merge;
    const int64_t row = (block * merge + patch_y % merge) * merge + patch_x % merge;
    const int64_t area = (row * 3 + channel) * temporal_patch + frame % temporal_patch;
    return data + (area * patch_height + y % patch_height) * patch_width + x % patch_width;
  }
  __device__ int slots(int frame) const { return frame == frames - 1 ? temporal_patch - frame % temporal_patch : 1; }
  __device__ float load(int frame, int channel, int y, int x) const {
    const T* from = at(frame, channel, y, x);
    float sum = static_cast<float>(*from);
    for (int slot = slots(frame); --slot;) sum += static_cast<float>(*(from += patch_height * patch_width));
    return sum;
  }
  __device__ void store(int frame, int channel, int y, int x, float value) const {
    T* to = at(frame, channel, y, x);
    *to = T(value);
    for (int slot = slots(frame); --slot;) *(to += patch_height * patch_width) = T(value);
  }
};

struct Band {  // row i has weight[i * taps + k] at column start[i] + k; start ascends
  const int* start = nullptr;
  const float* weight = nullptr;
  int taps = 0, columns = 0;
};

constexpr int Threads = 256, PixelsPerThread = 4;

template <class From, class To>
struct Work {  // every plane (frame, channel) of `to` becomes (resized plane of `from` - mean) / std
  From from;
  To to;
  Band y, x;
  float mean[3], std[3];
  int height, width;  // of a plane of `to`
  // `resize`: a block makes tile_y x tile_x pixels, for which it reads at most `pitch` columns.
  int tile_y = 0, tile_x = 0, pitch = 0;

  __device__ void store(int frame, int channel, int row, int column, float value) const {
    to.store(frame, channel, row, column, (value - mean[channel]) / std[channel]);
  }
};

// Block i does PixelsPerThread * Threads pixels of plane i / blocks_per_plane.
template <class From, class To>
__global__ void __launch_bounds__(Threads) copy(const __grid_constant__ Work<From, To> work, int blocks_per_plane) {
  const int plane = blockIdx.x / blocks_per_plane, frame = plane / 3, channel = plane % 3;
  const unsigned first = blockIdx.x % blocks_per_plane * (PixelsPerThread * Threads) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < PixelsPerThread; ++i) {
    const unsigned pixel = first + i * Threads;
    const int y = pixel / work.width, x = pixel % work.width;
    if (y < work.height) work.store(frame, channel, y, x, work.from.load(frame, channel, y, x));
  }
}

// A warp's lanes stand side by side in a row, where they read and write neighbours and share the row's weights.
template <class From, class To>
__global__ void __launch_bounds__(Threads)
    resize(const __grid_constant__ Work<From, To> work, int tiles_y, int tiles_x) {
  float* const between = reinterpret_cast<float*>(ptx::dynamic_shared());  // (tile_y, pitch)
  const int tile_x = blockIdx.x % tiles_x, tile_y = blockIdx.x / tiles_x % tiles_y;
  const int plane = blockIdx.x / tiles_x / tiles_y, frame = plane / 3, channel = plane % 3;
  const int y_begin = tile_y * work.tile_y, y_end = min(y_begin + work.tile_y, work.height);
  const int x_begin = tile_x * work.tile_x, x_end = min(x_begin + work.tile_x, work.width);
  const int column_begin = work.x.start[x_begin], column_end = work.x.start[x_end - 1] + work.x.taps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  for (int y = y_begin + warp; y < y_end; y += Threads / 32) {
    const float* const weight = work.y.weight + y * work.y.taps;
    const int row = work.y.start[y];
    for (int column = column_begin + lane; column < column_end; column += 32) {
      float sum = 0;
      for (int k = 0; k < work.y.taps; ++k) sum += weight[k] * work.from.load(frame, channel, row + k, column);
      between[(y - y_begin) * work.pitch + column - column_begin] = sum;
    }
  }
  __syncthreads();

  for (int y = y_begin + warp; y < y_end; y += Threads / 32)
    for (int x = x_begin + lane; x < x_end; x += 32) {
      const float* const weight = work.x.weight + x * work.x.taps;
      const float* const from = between + (y - y_begin) * work.pitch + work.x.start[x] - column_begin;
      float sum = 0;
      for (int k = 0; k < work.x.taps; ++k) sum += weight[k] * from[k];
      work.store(frame, channel, y, x, sum);
    }
}

constexpr int Columns = 64;  // pixels of a row that a block of `shuffle` does

// y (frames, height, width, 3 upscale^2) before its pixel shuffle, and the rows of the video. A block owns some columns
// of the `upscale` lines, in every channel, that a row of y becomes: they share what it reads and writes of y.
template <class T, class Out>
struct Shuffle {
  T* y;
  Rows<Out> rows;
  const int* slots;  // (frames, repeats): where frame g of y stands in the video; -1 is none
  int repeats;
  uint8_t* inside;  // a bit for every pixel within [0, 1]: (frames, 3, upscale height, bytes)
  int height, width, upscale;
  float mean[3], std[3];

  // f(frame, line, y, x, whether there is such a pixel): line / upscale is its channel. All lanes of a warp, or none.
  template <class F>
  __device__ void for_each_pixel(const F& f) const {
    const int tiles = (width * upscale + Columns - 1) / Columns;
    const int row = blockIdx.x / tiles, first = blockIdx.x % tiles * Columns;
    for (int i = threadIdx.x; i < 3 * upscale * Columns; i += Threads) {
      const int line = i / Columns, x = first + i % Columns;
      f(static_cast<int>(blockIdx.y), line, row * upscale + line % upscale, x, x < width * upscale);
    }
  }
  __device__ T* at(int frame, int line, int y_at, int x) const {
    const int64_t pixel = (int64_t{frame} * height + y_at / upscale) * width + x / upscale;
    return y + (pixel * 3 * upscale + line) * upscale + x % upscale;
  }
  __device__ uint8_t* bits(int frame, int line, int y_at, int x) const {
    const int64_t from = (int64_t{frame} * 3 + line / upscale) * height * upscale + y_at;
    return inside + from * ((width * upscale + 7) / 8) + x / 8;
  }
};

template <class T, class Out>
__global__ void __launch_bounds__(Threads) shuffle(const __grid_constant__ Shuffle<const T, Out> s) {
  s.for_each_pixel([&](int frame, int line, int y, int x, bool real) {
    const float value = real ? static_cast<float>(*s.at(frame, line, y, x)) : -1.f;
    const unsigned votes = __ballot_sync(0xffffffff, value >= 0 && value <= 1);
    if (!real) return;
    if (x % 8 == 0) *s.bits(frame, line, y, x) = static_cast<uint8_t>(votes >> threadIdx.x % 32);
    const int channel = line / s.upscale;
    const float clamped = value < 0 ? 0 : value > 1 ? 1 : value;  // a NaN stays NaN
    const Out normal = Out((clamped - s.mean[channel]) / s.std[channel]);
    for (int i = 0; i < s.repeats; ++i)
      if (const int slot = s.slots[frame * s.repeats + i]; slot >= 0) *s.rows.at(slot, channel, y, x) = normal;
  });
}

// y is the gradient of y, which is written.
template <class T, class Out>
__global__ void __launch_bounds__(Threads) unshuffle(const __grid_constant__ Shuffle<Out, const T> s) {
  s.for_each_pixel([&](int frame, int line, int y, int x, bool real) {
    if (!real) return;
    const int channel = line / s.upscale;
    float sum = 0;
    if (*s.bits(frame, line, y, x) >> x % 8 & 1)
      for (int i = 0; i < s.repeats; ++i)
        if (const int slot = s.slots[frame * s.repeats + i]; slot >= 0)
          sum += static_cast<float>(*s.rows.at(slot, channel, y, x));
    *s.at(frame, line, y, x) = Out(sum / s.std[channel]);
  });
}

}  // namespace patchify
