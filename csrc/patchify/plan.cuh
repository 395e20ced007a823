// Which kernel makes the patch rows of a video, or the gradient of its pixels: host code, templated on what a `Device`
// is (see csrc/lora_linear/plan.cuh), so that the tests drive the CPU through the very same launches.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.cuh"

namespace patchify {

constexpr int MostShared = 48 * 1024;  // bytes that every GPU gives a block

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int checked(int64_t count) {
  if (count > 0x7fffffff) throw std::runtime_error("patchify: too many pixels for one launch");
  return static_cast<int>(count);
}

// The most columns that `rows` neighbouring rows of a band with `all` rows can read: starts are where a line of slope
// columns / all passes, give or take one for rounding and one for a weight that is zero.
inline int64_t most_columns(const Band& band, int64_t all, int64_t rows) {
  return std::min<int64_t>(band.columns, divide_up((rows - 1) * band.columns, all) + 2 + band.taps);
}

template <class From, class To, class Device>
void run(Device& device, Work<From, To> work, int frames) {
  const int64_t planes = int64_t{3} * frames;
  if (!work.y.start) {
    const int64_t each = divide_up(checked(int64_t{work.height} * work.width), Threads * PixelsPerThread);
    return device.launch(copy<From, To>, dim3(checked(planes * each)), Threads, 0, work, static_cast<int>(each));
  }
  work.tile_y = 16, work.tile_x = 64;
  const auto bytes = [&] {
    work.pitch = most_columns(work.x, work.width, work.tile_x);
    return int64_t{work.tile_y} * work.pitch * static_cast<int64_t>(sizeof(float));
  };
  while (bytes() > MostShared && work.tile_x > 1) work.tile_x /= 2;
  while (bytes() > MostShared && work.tile_y > 1) work.tile_y /= 2;
  if (bytes() > MostShared)
    throw std::runtime_error("patchify: a row of " + std::to_string(work.x.columns) + " pixels is too long to become " +
                             std::to_string(work.width));
  const int64_t tiles_y = divide_up(work.height, work.tile_y), tiles_x = divide_up(work.width, work.tile_x);
  device.launch(resize<From, To>, dim3(checked(planes * tiles_y * tiles_x)), Threads, static_cast<int>(bytes()), work,
                static_cast<int>(tiles_y), static_cast<int>(tiles_x));
}

struct Sizes {  // of the frames that are cut into patches, after the resize
  int frames, height, width, patch, temporal_patch, merge;
};

template <class T>
Rows<T> rows_of(T* data, const Sizes& s) {
  const int block = s.patch * s.merge;
  return {data, s.patch, s.patch, s.temporal_patch, s.merge, s.width / block, s.height / block, s.frames};
}

// Bands without a `start` where nothing is resized.
template <class T, class Out, class Device>
void forward(Device& device, const Pixels<const T>& frames, const Sizes& sizes, const Band& y, const Band& x,
             const double* mean, const double* std, Out* out) {
  Work<Pixels<const T>, Rows<Out>> work{frames, rows_of(out, sizes), y, x, {}, {}, sizes.height, sizes.width};
  std::copy_n(mean, 3, work.mean);
  std::copy_n(std, 3, work.std);
  run(device, work, sizes.frames);
}

// `out` is (frames, 3, height, width), contiguous; the bands are the transposed ones.
template <class T, class Out, class Device>
void backward(Device& device, const T* grad, const Sizes& sizes, const Band& y, const Band& x, const double* std,
              int height, int width, Out* out) {
  const Pixels<Out> pixels{out, int64_t{3} * height * width, int64_t{height} * width, width, 1};
  Work<Rows<const T>, Pixels<Out>> work{rows_of(grad, sizes), pixels, y, x, {}, {}, height, width};
  std::copy_n(std, 3, work.std);
  run(device, work, sizes.frames);
}

struct Shuffled {  // of y, and how its frames lie in the rows
  int frames, height, width, upscale;
  int patch_height, patch_width, temporal_patch, merge;
  const int* slots;
  int repeats;
};

template <class T, class Out>
Shuffle<T, Out> shuffle_of(const Shuffled& s, T* y, Out* rows, uint8_t* inside, const double* mean, const double* std) {
  const int blocks_x = s.width * s.upscale / (s.patch_width * s.merge);
  const int blocks_y = s.height * s.upscale / (s.patch_height * s.merge);
  Shuffle<T, Out> work{y,       {rows, s.patch_height, s.patch_width, s.temporal_patch, s.merge, blocks_x, blocks_y, 0},
                       s.slots, s.repeats,
                       inside,  s.height,
                       s.width, s.upscale,
                       {},      {}};
  std::copy_n(mean, 3, work.mean);
  std::copy_n(std, 3, work.std);
  return work;
}

inline dim3 shuffle_grid(const Shuffled& s) {
  return dim3(checked(divide_up(int64_t{s.width} * s.upscale, Columns) * s.height), s.frames);
}

template <class T, class Out, class Device>
void shuffle_forward(Device& device, const Shuffled& s, const T* y, Out* rows, uint8_t* inside, const double* mean,
                     const double* std) {
  if (s.frames) device.launch(shuffle<T, Out>, shuffle_grid(s), Threads, 0, shuffle_of(s, y, rows, inside, mean, std));
}

template <class T, class Out, class Device>
void shuffle_backward(Device& device, const Shuffled& s, const T* grad, const uint8_t* inside, Out* dy,
                      const double* mean, const double* std) {
  if (s.frames)
    device.launch(unshuffle<T, Out>, shuffle_grid(s), Threads, 0,
                  shuffle_of(s, dy, grad, const_cast<uint8_t*>(inside), mean, std));  // read alone
}

}  // namespace patchify
