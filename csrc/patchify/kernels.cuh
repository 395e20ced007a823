// Device code of resize + normalise + patchify + cast; the definition is vlmteacher/ops/patchify.py, the order of
// launches plan.cuh.
//
// A video is read and written through a layout, Pixels or Rows (the patch rows), so that one kernel serves both
// directions: `resize` adds up rows into shared memory and columns out of it, `copy` is what is left where nothing is
// resized. Every output is written by one thread. No torch here: nvcc compiles this file alone, and the tests execute
// it on the CPU. It has never run on a GPU.
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
  int patch, temporal_patch, merge, blocks_x, blocks_y, frames;

  // The first of the frame's slots; the last frame was repeated into what follows in its temporal patch.
  __device__ T* at(int frame, int channel, int y, int x) const {
    const int patch_y = y / patch, patch_x = x / patch;
    const int64_t block = (int64_t{frame / temporal_patch} * blocks_y + patch_y / merge) * blocks_x + patch_x / merge;
    const int64_t row = (block * merge + patch_y % merge) * merge + patch_x % merge;
    const int64_t area = (row * 3 + channel) * temporal_patch + frame % temporal_patch;
    return data + (area * patch + y % patch) * patch + x % patch;
  }
  __device__ int slots(int frame) const { return frame == frames - 1 ? temporal_patch - frame % temporal_patch : 1; }
  __device__ float load(int frame, int channel, int y, int x) const {
    const T* from = at(frame, channel, y, x);
    float sum = static_cast<float>(*from);
    for (int slot = slots(frame); --slot;) sum += static_cast<float>(*(from += patch * patch));
    return sum;
  }
  __device__ void store(int frame, int channel, int y, int x, float value) const {
    T* to = at(frame, channel, y, x);
    *to = T(value);
    for (int slot = slots(frame); --slot;) *(to += patch * patch) = T(value);
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

}  // namespace patchify
