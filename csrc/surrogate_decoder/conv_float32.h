// The convolutions in float32 products, of elements of type T: float, or BFloat16 where the processor has no products
// of its own for it. conv_avx2.cpp and conv_avx512.cpp include this (see vectors.h).
//
// 3x3 taps go by Winograd's F(2x2, 3x3): a tile of 2x2 output pixels is the 4x4 products of its transformed 4x4 inputs
// with the transformed weights, 16 products for 36. Source: Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, 2016, section 4.1. The 2x2 taps of an upsampled image, and the 16 of its gradient, are summed as they are.
#pragma once
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cstring>

#include "../vectors.h"
#include "conv.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace vlmteacher::surrogate_decoder {
namespace {

using Floats = Vector<float>;
constexpr int64_t kWide = kLanes<float>;
constexpr int64_t kRows = kVectorBytes == 64 ? 12 : 6;  // beside two vectors of sums each; 8 beside three
constexpr int64_t kTransformed = 256 << 10;             // bytes of transformed inputs that stay in the cache

// kWide bits, from the first bytes of `signs`, as a mask. Behind the last of them nothing is read.
inline Words mask_of(const uint8_t* signs, int64_t count) {
  uint32_t bits = *signs;
  if (count > 8) bits |= uint32_t(signs[1]) << 8;
  Words lane;
  for (int i = 0; i < kWide; ++i) lane[i] = 1u << i;
  return (Words)(((Words{} + bits) & lane) != 0);
}

inline void store_signs(uint8_t* signs, int64_t count, const Floats& value) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  bits = _mm512_cmp_ps_mask((__m512)value, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  bits = uint32_t(_mm256_movemask_ps((__m256)(value > 0)));
#else
  for (int i = 0; i < kWide; ++i) bits |= uint32_t(value[i] > 0) << i;
#endif
  if (count < kWide) bits &= (1u << count) - 1;
  *signs = uint8_t(bits);
  if (count > 8) signs[1] = uint8_t(bits >> 8);
}

inline Floats masked(const Floats& value, const Words& set, float slope) { return set ? value : value * slope; }

template <class T>
void fill_strip(const Conv& conv, const Source* sources, int64_t first_row, int64_t count, float* strip) {
  const int64_t words = conv.words, sign_bytes = (conv.channels + 7) / 8, row_words = conv.pitch * words;
  for (int64_t r = 0; r < count; ++r, strip += row_words) {
    const int64_t row = first_row + r;
    if (row < 0 || row >= conv.in_height) {
      std::memset(strip, 0, row_words * 4);
      continue;
    }
    std::memset(strip, 0, words * 4);
    std::memset(strip + (conv.in_width + 1) * words, 0, (conv.pitch - conv.in_width - 1) * words * 4);
    for (int64_t s = 0; s < conv.sources; ++s) {
      const Source& source = sources[s];
      for (int64_t x = 0; x < conv.in_width; ++x) {
        const int64_t at = row * conv.in_width + x;
        float* to = strip + (x + 1) * words + s * conv.channels;
        const T* from = static_cast<const T*>(source.frame) + (source.frame ? at * conv.channels : 0);
        if (!source.frame)
          std::memset(to, 0, conv.channels * 4);
        else
          runs<float>(
              conv.channels, RUN(&) {
                Floats value = load(from + i, count);
                if (source.signs)
                  value = masked(value, mask_of(source.signs + at * sign_bytes + i / 8, count), conv.slope);
                store(to + i, count, value);
              });
      }
    }
  }
}

// Bias, residual and activation of a vector of output channels, from `channel` on, of a pixel.
template <class T>
inline void finish(const Conv& conv, const Frame& frame, int64_t pixel, int64_t channel, Floats value) {
  const int64_t left = conv.out_channels - channel, count = left < kWide ? left : kWide;
  const int64_t sign_at = pixel * ((conv.out_channels + 7) / 8) + channel / 8, at = pixel * conv.out_channels + channel;
  value += load(conv.bias + channel);
  if (frame.residual) {
    Floats more = load(static_cast<const T*>(frame.residual) + at, count);
    if (frame.residual_signs) more = masked(more, mask_of(frame.residual_signs + sign_at, count), conv.slope);
    value += more;
  }
  if (frame.signs) {
    store_signs(frame.signs + sign_at, count, value);
    value = masked(value, (Words)(value > 0), conv.slope);
  }
  store(static_cast<T*>(frame.out) + at, count, value);
}

template <int ROWS, int VECTORS>
struct Sums {
  Floats value[ROWS][VECTORS] = {};

  // += ROWS pixels, `step` words from one to the next, times a panel (words, VECTORS, kWide).
  void add(const float* left, int64_t step, const float* panel, int64_t words) {
    for (; words > 0; --words, ++left, panel += VECTORS * kWide) {
      Floats right[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; ++v) right[v] = load(panel + v * kWide);
      UNROLL for (int i = 0; i < ROWS; ++i) {
        const Floats word = Floats{} + left[i * step];
        UNROLL for (int v = 0; v < VECTORS; ++v) value[i][v] += word * right[v];
      }
    }
  }
};

// f<ROWS>(first) for runs of `count` rows.
template <int VECTORS, class F>
inline void by_rows(int64_t count, const F& f) {
  constexpr int rows = VECTORS < 3 ? int(kRows) : 8;
  int64_t i = 0;
  for (; i + rows <= count; i += rows) f.template operator()<rows>(i);
  for (; i + 4 <= count; i += 4) f.template operator()<4>(i);
  for (; i < count; ++i) f.template operator()<1>(i);
}

// f<VECTORS>(first channel, its panel) for all panels of a phase, each of taps (words, vectors, kWide).
template <class F>
inline void by_panels(const Conv& conv, const float*& panel, const F& f) {
  constexpr int64_t last = kVectorBytes == 64 ? 3 : 2;
  for (int64_t channel = 0, vectors; channel < conv.out_channels; channel += vectors * kWide) {
    const int64_t left = (conv.out_channels - channel + kWide - 1) / kWide;
    vectors = left <= last ? left : 2;
    if (vectors == 3) f.template operator()<3>(channel, panel);
    if (vectors == 2) f.template operator()<2>(channel, panel);
    if (vectors == 1) f.template operator()<1>(channel, panel);
    panel += conv.taps * conv.words * vectors * kWide;
  }
}

template <class T>
void direct(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, const float* strip) {
  const int64_t words = conv.words, row = conv.pitch * words, out_width = conv.width * conv.out_step;
  const float* panel = reinterpret_cast<const float*>(conv.weights);
  for (int64_t phase = 0; phase < conv.phases; ++phase)
    by_panels(conv, panel, [&]<int VECTORS>(int64_t channel, const float* weights) {
      for (int64_t i = begin; i < end; ++i)
        by_rows<VECTORS>(conv.width, [&]<int ROWS>(int64_t first) {
          Sums<ROWS, VECTORS> total;
          const float* from = strip + ((i - begin) * conv.step + 1) * row + (first * conv.step + 1) * words;
          for (int64_t k = 0; k < conv.taps; ++k) {
            const Tap& tap = conv.tap[phase * conv.taps + k];
            Sums<ROWS, VECTORS> part;
            part.add(from + tap.row * row + tap.column * words, conv.step * words,
                     weights + k * words * VECTORS * kWide, words);
            UNROLL for (int r = 0; r < ROWS; ++r) UNROLL for (int v = 0; v < VECTORS; ++v) total.value[r][v] +=
                part.value[r][v];
          }
          for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v)
              finish<T>(conv, frame,
                        (i * conv.out_step + phase / 2) * out_width + (first + r) * conv.out_step + phase % 2,
                        channel + v * kWide, total.value[r][v]);
        });
    });
}

// --------------------------------------------------------------------------------------------------- Winograd

// Tiles at a time, and the floats of a row of their transformed inputs.
inline int64_t tiles_at_once(const Conv& conv) {
  const int64_t fit = kTransformed / (16 * 4 * conv.words) / kRows * kRows;
  return fit > kRows ? fit : kRows;
}
inline int64_t row_floats(const Conv& conv) { return (conv.words + kWide - 1) / kWide * kWide; }

inline int64_t winograd_scratch(const Conv& conv, int64_t rows) {
  if (conv.tap) return 64;
  const int64_t all = (rows + 1) / 2 * ((conv.width + 1) / 2), some = tiles_at_once(conv),
                tiles = all < some ? all : some;
  return 64 + 16 * tiles * (row_floats(conv) + 3 * kWide) * 4 + 64;
}

// v = B^T d B of kWide channels: d (4, 4) pixels, to 16 rows `step` apart.
inline void transform_input(const float* d, int64_t row, int64_t pixel, float* to, int64_t step) {
  Floats t[4][4];
  UNROLL for (int j = 0; j < 4; ++j) {
    const Floats a = load(d + j * pixel), b = load(d + row + j * pixel), c = load(d + 2 * row + j * pixel),
                 e = load(d + 3 * row + j * pixel);
    t[0][j] = a - c, t[1][j] = b + c, t[2][j] = c - b, t[3][j] = b - e;
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    store(to + (4 * i) * step, t[i][0] - t[i][2]);
    store(to + (4 * i + 1) * step, t[i][1] + t[i][2]);
    store(to + (4 * i + 2) * step, t[i][2] - t[i][1]);
    store(to + (4 * i + 3) * step, t[i][1] - t[i][3]);
  }
}

// A^T m A, m (4, 4) `step` floats apart.
inline void transform_output(const float* m, int64_t step, Floats (&out)[2][2]) {
  Floats s[2][4];
  UNROLL for (int j = 0; j < 4; ++j) {
    const Floats a = load(m + j * step), b = load(m + (4 + j) * step), c = load(m + (8 + j) * step),
                 d = load(m + (12 + j) * step);
    s[0][j] = a + b + c, s[1][j] = b - c - d;
  }
  UNROLL for (int i = 0; i < 2; ++i) out[i][0] = s[i][0] + s[i][1] + s[i][2], out[i][1] = s[i][1] - s[i][2] - s[i][3];
}

template <class T>
void winograd(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, const float* strip, float* scratch) {
  const int64_t words = conv.words, row = conv.pitch * words, across = (conv.width + 1) / 2;
  const int64_t all = (end - begin + 1) / 2 * across, most = tiles_at_once(conv), length = row_floats(conv);
  for (int64_t first = 0; first < all; first += most) {
    const int64_t tiles = all - first < most ? all - first : most;
    float *const inputs = scratch, *const products = scratch + 16 * tiles * length;
    for (int64_t t = 0; t < tiles; ++t) {
      const float* from = strip + (first + t) / across * 2 * row + (first + t) % across * 2 * words;
      for (int64_t k = 0; k < words; k += kWide)
        transform_input(from + k, row, words, inputs + t * length + k, tiles * length);
    }
    const float* panel = reinterpret_cast<const float*>(conv.weights);
    by_panels(conv, panel, [&]<int VECTORS>(int64_t channel, const float* weights) {
      constexpr int64_t columns = VECTORS * kWide;
      for (int64_t place = 0; place < 16; ++place)
        by_rows<VECTORS>(tiles, [&]<int ROWS>(int64_t t) {
          Sums<ROWS, VECTORS> sums;
          sums.add(inputs + (place * tiles + t) * length, length, weights + place * words * columns, words);
          float* to = products + (place * tiles + t) * columns;
          UNROLL for (int r = 0; r < ROWS; ++r) UNROLL for (int v = 0; v < VECTORS; ++v)
              store(to + r * columns + v * kWide, sums.value[r][v]);
        });
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t y = begin + (first + t) / across * 2, x = (first + t) % across * 2;
        for (int64_t v = 0; v < VECTORS; ++v) {
          Floats out[2][2];
          transform_output(products + t * columns + v * kWide, tiles * columns, out);
          for (int64_t i = 0; i < 2 && y + i < end; ++i)
            for (int64_t j = 0; j < 2 && x + j < conv.width; ++j)
              finish<T>(conv, frame, (y + i) * conv.width + x + j, channel + v * kWide, out[i][j]);
        }
      }
    });
  }
}

template <class T>
void rows_of(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, char* scratch) {
  const int64_t count = conv.strip_rows(end - begin);
  float* const strip = reinterpret_cast<float*>(scratch);
  fill_strip<T>(conv, frame.sources, conv.step * begin - 1, count, strip);
  if (conv.tap) return direct<T>(conv, frame, begin, end, strip);
  winograd<T>(conv, frame, begin, end, strip,
              reinterpret_cast<float*>(scratch + (conv.strip_bytes(end - begin) + 127) / 64 * 64));
}

template <class T>
Kernels kernels() {
  return {false, true, 1, kWide, 2, kVectorBytes == 64 ? 3 : 2, winograd_scratch, rows_of<T>};
}

}  // namespace
}  // namespace vlmteacher::surrogate_decoder
