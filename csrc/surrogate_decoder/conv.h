// A 3x3 convolution over a few rows of one output frame, in one form for all cases. Its input frames are copied,
// with their masks applied, into a padded strip that stays in the cache; the rest is a sum over taps: products of
// pixels, at fixed offsets in the strip, with packed weights. See cpu.cpp for the cases.
#pragma once
#include <cstdint>

namespace vlmteacher::surrogate_decoder {

constexpr int64_t kLanes = 16;  // output channels of a vector

// Vectors of the next panel of packed weights: two, which twelve pixels share, or the last three, which eight do.
constexpr int64_t panel_vectors(int64_t left) { return left <= 3 ? left : 2; }

struct Tap {
  int64_t row, column;  // in the strip, from that of the output pixel
};

struct Source {
  const void* frame;     // (in_height, in_width, channels), or null: zeros
  const uint8_t* signs;  // of its elements, or null: those without one are multiplied by the slope
};

struct Frame {
  const Source* sources;
  const void* residual;  // (out_height, out_width, out_channels), or null
  const uint8_t* residual_signs;
  void* out;
  uint8_t* signs;  // null: no activation
};

struct Conv {
  bool half;                              // bfloat16, else float32
  int64_t in_height, in_width, channels;  // of a source
  int64_t sources;                        // per output frame, beside one another in the strip
  int64_t height, width, step;            // the grid of output pixels of a phase; strip pixels from one to the next
  int64_t phases, out_step;               // phase 2 a + b writes at rows out_step i + a, columns out_step j + b
  int64_t taps;                           // per phase
  const Tap* tap;                         // [phase][tap]
  int64_t out_channels;
  const int32_t* weights;  // [phase][panel][tap][word][vector][lane]; a word is two bfloat16 or one float32
  const float* bias;       // zeros up to a whole vector
  float slope;

  int64_t words() const { return half ? (sources * channels + 1) / 2 : sources * channels; }
  int64_t strip_rows(int64_t rows) const { return step * (rows - 1) + (step == 1 ? 3 : 4); }
  int64_t strip_bytes(int64_t rows) const { return strip_rows(rows) * (in_width + 2) * words() * 4; }
};

bool available();

// Rows [begin, end) of the grid; `strip` has strip_bytes(end - begin), aligned to 64.
void rows(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, char* strip);

}  // namespace vlmteacher::surrogate_decoder
