// Which kernels compute the surrogate decoder's convolutions: host code, templated on what a `Device` is, as that of
// lora_linear (launch, scratch), so that the tests drive the CPU through the very same launches.
#pragma once

#include <algorithm>

#include "kernels.cuh"

namespace surrogate_decoder {

struct Shape {
  int frames, outputs, taps;       // in the bank, of the result, per frame of the result
  int height, width, channels, n;  // of the bank's frames; channels of the result
  int upscale;
  float slope;
};

template <class Tile, bool Backward, class T, class Device>
void launch_tile(Device& device, const Conv<T>& p, int frames) {
  const auto tiles = [](int size, int tile) { return (size + tile - 1) / tile; };
  const int count = tiles(p.height, Tile::M / Across) * tiles(p.width, Across) * tiles(p.columns, Tile::N);
  if (count && frames)
    device.launch(conv<T, Tile, Backward>, dim3(count, frames), Tile::Threads,
                  shared_bytes<T, Tile, Along::Depth, Backward ? Along::Side : Along::Depth>(), p);
}

template <bool Backward, class T, class Device>
void launch(Device& device, const Conv<T>& p, int frames) {
  if constexpr (std::is_same_v<T, float>)
    launch_tile<Wide<T>, Backward>(device, p, frames);
  else if (p.columns > Middle::N)
    launch_tile<Wide<T>, Backward>(device, p, frames);
  else if (p.columns > Thin::N)
    launch_tile<Middle, Backward>(device, p, frames);
  else
    launch_tile<Thin, Backward>(device, p, frames);
}

template <class T, class Device>
const T* folded(Device& device, const T* weight, const Shape& s) {
  if (s.upscale == 1) return weight;
  const int channels = s.taps * s.channels;
  const int64_t size = int64_t{s.n} * 16 * channels, blocks = std::min<int64_t>((size + 255) / 256, 1024);
  T* const to = device.template scratch<T>(size);
  if (blocks) device.launch(fold<T>, dim3(blocks), 256, 0, weight, size, channels, to);
  return to;
}

// y and, where signs is not null, the activation and its signs; residual and its rows may be null.
template <class T, class Device>
void forward(Device& device, const T* x, const int* taps, const T* weight, const T* bias, const T* residual,
             const int* rows, const Shape& s, T* y, uint8_t* signs) {
  if (!s.outputs) return;
  launch<false>(device,
                Conv<T>{.from = x,
                        .weight = folded(device, weight, s),
                        .bias = bias,
                        .frames = taps,
                        .residual = residual,
                        .rows = rows,
                        .out = y,
                        .signs = signs,
                        .taps = s.taps,
                        .depth = s.channels,
                        .columns = s.n,
                        .height = s.height,
                        .width = s.width,
                        .upscale = s.upscale,
                        .slope = s.slope},
                s.outputs * s.upscale * s.upscale);
}

// dx from the gradient of y and, where not null, the one that comes back through the residual; the signs are null
// without an activation.
template <class T, class Device>
void backward(Device& device, const T* grad, const uint8_t* signs, const int* taps, const T* weight, const T* residual,
              const uint8_t* residual_signs, const Shape& s, T* dx) {
  if (!s.frames) return;
  int* const users = device.template scratch<int>(int64_t{s.frames} * s.taps);
  device.launch(invert, dim3(1), 256, 0, taps, s.outputs, s.taps, s.frames, users);
  launch<true>(device,
               Conv<T>{.from = grad,
                       .weight = folded(device, weight, s),
                       .frames = users,
                       .residual = residual,
                       .rows = users,  // of which the first tap's
                       .rows_stride = s.taps,
                       .residual_signs = residual_signs,
                       .out = dx,
                       .signs = const_cast<uint8_t*>(signs),  // of the forward pass alone written
                       .taps = s.taps,
                       .depth = s.n,
                       .columns = s.channels,
                       .height = s.height,
                       .width = s.width,
                       .upscale = s.upscale,
                       .slope = s.slope},
               s.frames);
}

}  // namespace surrogate_decoder
