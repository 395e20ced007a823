// A 3x3 convolution over a few rows of one output frame, in one form for all cases. Its input frames are copied,
// with their masks applied, into a padded strip that stays in the cache; the rest is a sum over taps: products of
// pixels, at fixed offsets in the strip, with packed weights. See cpu.cpp for the cases.
#pragma once
#include <cstdint>

#include "../processor.h"

namespace vlmteacher::surrogate_decoder {

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
  int64_t in_height, in_width, channels;  // of a source
  int64_t sources;                        // per output frame, beside one another in the strip
  int64_t words;                          // of a pixel in the strip: two bfloat16 or one float32 each
  int64_t pitch;                          // pixels from a row of the strip to the next
  int64_t height, width, step;            // the grid of output pixels of a phase; strip pixels from one to the next
  int64_t phases, out_step;               // phase 2 a + b writes at rows out_step i + a, columns out_step j + b
  int64_t taps;                           // per phase; by Winograd's method 16, the products of a tile
  const Tap* tap;                         // [phase][tap]; null by Winograd's method
  int64_t out_channels;
  const int32_t* weights;  // [phase][panel][tap][word][vector][lane]
  const float* bias;       // zeros up to a whole panel
  float slope;

  int64_t strip_rows(int64_t rows) const { return step * (tap ? rows : rows + rows % 2) + 2; }
  int64_t strip_bytes(int64_t rows) const { return strip_rows(rows) * pitch * words * 4; }
};

// By element type and instruction set.
struct Kernels {
  bool pairs;           // a word is two bfloat16, else one float32
  bool winograd;        // a convolution of 3x3 taps is computed by Winograd's method
  int64_t whole_words;  // a pixel's words are a multiple of this, with zeros behind the channels
  int64_t lanes;        // output channels of a vector
  int64_t most;         // vectors of a panel: most while more than that are left,
  int64_t last;         // else all, if they are at most `last`
  int64_t (*more_scratch)(const Conv& conv, int64_t rows);  // bytes behind the strip
  // Rows [begin, end) of the grid; `scratch`, aligned to 64, has strip_bytes(end - begin), then more_scratch.
  void (*rows)(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, char* scratch);

  int64_t panel_vectors(int64_t left) const { return left <= last ? left : most; }
};

FOR_SOME_PROCESSORS Kernels float32_avx2();
FOR_SOME_PROCESSORS Kernels bfloat16_avx2();
FOR_SOME_PROCESSORS Kernels float32_avx512();
FOR_SOME_PROCESSORS Kernels bfloat16_avx512();
FOR_SOME_PROCESSORS Kernels bfloat16_avx512bf16();
FOR_SOME_PROCESSORS Kernels bfloat16_amx();

}  // namespace vlmteacher::surrogate_decoder
