// Products of bfloat16 by AVX-512 BF16; called only on processors that have it.
#if defined(__AVX512BF16__)
#include "conv_bfloat16.h"

namespace vlmteacher::surrogate_decoder {
namespace {

struct Tile {
  const Conv* conv;
  const Frame* frame;
  const Tap* tap;
  const char* strip;  // where the first output pixel stands in it
  int64_t row_bytes, pixel_bytes;
  int64_t skipped, words, left_out;  // of a pixel: those of a missing first source, those to sum, the rest
  const char* panel;
  int64_t pixel, channel;  // the first output pixel, the first channel
};

template <int PIXELS, int VECTORS>
struct Sums {
  __m512 value[PIXELS][VECTORS];

  void clear() { UNROLL for (auto& pixel : value) UNROLL for (auto& vector : pixel) vector = _mm512_setzero_ps(); }

  void add(const char* left, int64_t step, const char*& panel, int64_t words) {
    for (; words > 0; --words, left += 4, panel += 64 * VECTORS) add_word<BFloat16>(value, left, step, panel);
  }
};

template <int PIXELS, int VECTORS>
void run(const Tile& t) {
  const Conv& conv = *t.conv;
  const int64_t step = conv.step * t.pixel_bytes;
  const char* panel = t.panel;
  // What the end of this function will touch is not in the cache yet.
  UNROLL for (int i = 0; i < PIXELS; ++i) {
    const int64_t at = ((t.pixel + i * conv.out_step) * conv.out_channels + t.channel) * BFloat16::kBytes;
    if (t.frame->residual) _mm_prefetch(static_cast<const char*>(t.frame->residual) + at, _MM_HINT_T0);
    __builtin_prefetch(static_cast<char*>(t.frame->out) + at, 1);
  }
  Sums<PIXELS, VECTORS> total;
  total.clear();
  for (int64_t k = 0; k < conv.taps; ++k) {
    const char* left = t.strip + t.tap[k].row * t.row_bytes + t.tap[k].column * t.pixel_bytes + 4 * t.skipped;
    panel += 64 * VECTORS * t.skipped;
    total.add(left, step, panel, t.words);
    panel += 64 * VECTORS * t.left_out;
  }
  UNROLL for (int i = 0; i < PIXELS; ++i) {
    UNROLL for (int v = 0; v < VECTORS; ++v)
        finish(conv, *t.frame, t.pixel + i * conv.out_step, t.channel + v * kLanes, total.value[i][v]);
  }
}

template <int VECTORS>
void run_row(Tile t, int64_t pixels) {
  const auto go = [&](auto function, int64_t count) {
    function(t);
    pixels -= count;
    t.strip += count * t.conv->step * t.pixel_bytes;
    t.pixel += count * t.conv->out_step;
  };
  if constexpr (VECTORS < 3)
    while (pixels >= 12 && pixels != 16) go(run<12, VECTORS>, 12);
  while (pixels >= 8) go(run<8, VECTORS>, 8);
  if (pixels >= 4) go(run<4, VECTORS>, 4);
  while (pixels > 0) go(run<1, VECTORS>, 1);
}

void rows_of(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, char* strip) {
  fill_strip(conv, frame.sources, conv.step * begin - 1, conv.strip_rows(end - begin), strip);
  const int64_t pixel = conv.words * 4, row = conv.pitch * pixel, out_width = conv.width * conv.out_step;
  const char* panel = reinterpret_cast<const char*>(conv.weights);
  int64_t first = 0, end_word = conv.words;  // of two sources one may be missing
  if (conv.sources == 2 && !frame.sources[0].frame) first = conv.channels * BFloat16::kBytes / 4;
  if (conv.sources == 2 && !frame.sources[1].frame) end_word = (conv.channels * BFloat16::kBytes + 3) / 4;
  for (int64_t phase = 0; phase < conv.phases; ++phase)
    for (int64_t channel = 0, vectors; channel < conv.out_channels; channel += vectors * kLanes) {
      const int64_t left = (conv.out_channels - channel + kLanes - 1) / kLanes;
      vectors = left <= 3 ? left : 2;
      for (int64_t i = begin; i < end; ++i) {
        Tile t{&conv,
               &frame,
               conv.tap + phase * conv.taps,
               strip + ((i - begin) * conv.step + 1) * row + pixel,
               row,
               pixel,
               first,
               end_word - first,
               conv.words - end_word,
               panel,
               0,
               channel};
        t.pixel = (i * conv.out_step + phase / 2) * out_width + phase % 2;
        (vectors == 3 ? run_row<3> : vectors == 2 ? run_row<2> : run_row<1>)(t, conv.width);
      }
      panel += conv.taps * conv.words * vectors * 64;
    }
}

int64_t no_more_scratch(const Conv&, int64_t) { return 0; }

}  // namespace

Kernels bfloat16_avx512bf16() { return {true, false, 1, kLanes, 2, 3, no_more_scratch, rows_of}; }

}  // namespace vlmteacher::surrogate_decoder

#endif
