// Products of bfloat16 by AMX; called only on processors that have it. A pixel of the strip is whole tiles of 32
// channels, zeros behind its own. In steps of one pixel the strip is one row of positions, those between the rows of
// pixels included: their sums are not stored.
#if defined(__AMX_BF16__)
#include "../amx.h"
#include "conv_bfloat16.h"

namespace vlmteacher::surrogate_decoder {
namespace {

constexpr int64_t kPositions = 2 * kTileRows;

struct Run {  // of positions, in a strip
  const char* from;
  int64_t count, step;  // bytes from one to the next
  int64_t row, pitch;   // the output row of the first, positions of a row
};

void run(const Conv& conv, const Frame& frame, const Run& r, int64_t phase, int64_t end) {
  const int64_t pixel_bytes = conv.words * 4, row_bytes = conv.pitch * pixel_bytes, tiles = conv.words / kTileWords;
  const int64_t out_width = conv.width * conv.out_step;
  const Tap* taps = conv.tap + phase * conv.taps;
  alignas(64) float sums[kPositions][2 * kLanes];
  const char* panel = reinterpret_cast<const char*>(conv.weights);
  for (int64_t p = 0; p < phase; ++p)
    panel += conv.taps * conv.words * ((conv.out_channels + kLanes - 1) / kLanes) * 64;
  for (int64_t channel = 0; channel < conv.out_channels; channel += 2 * kLanes) {
    const int64_t vectors = conv.out_channels - channel > kLanes ? 2 : 1, tap_bytes = conv.words * vectors * 64;
    for (int64_t first = 0; first < r.count; first += kPositions) {
      zero_sums();
      for (int64_t k = 0; k < conv.taps; ++k) {
        const char* left = r.from + first * r.step + taps[k].row * row_bytes + taps[k].column * pixel_bytes;
        (vectors == 2 ? add_32_by_32 : add_32_by_16)(left, r.step, panel + k * tap_bytes, tiles);
      }
      store_32_by_32(sums[0], sizeof sums[0]);
      for (int64_t i = 0; i < kPositions && first + i < r.count; ++i) {
        const int64_t y = r.row + (first + i) / r.pitch, x = (first + i) % r.pitch;
        if (x >= conv.width || y >= end) continue;
        const int64_t pixel = (y * conv.out_step + phase / 2) * out_width + x * conv.out_step + phase % 2;
        for (int64_t v = 0; v < vectors; ++v)
          finish(conv, frame, pixel, channel + v * kLanes, _mm512_load_ps(sums[i] + v * kLanes));
      }
    }
    panel += conv.taps * tap_bytes;
  }
}

void rows_of(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, char* strip) {
  const Tiles tiles;
  fill_strip(conv, frame.sources, conv.step * begin - 1, conv.strip_rows(end - begin), strip);
  written();
  const int64_t pixel = conv.words * 4, row = conv.pitch * pixel;
  for (int64_t phase = 0; phase < conv.phases; ++phase) {
    const char* from = strip + row + pixel;
    if (conv.step == 1)
      run(conv, frame, {from, (end - begin) * conv.pitch, pixel, begin, conv.pitch}, phase, end);
    else
      for (int64_t y = begin; y < end; ++y, from += conv.step * row)
        run(conv, frame, {from, conv.width, conv.step * pixel, y, conv.width}, phase, end);
  }
}

// The last positions are read as a whole run of them.
int64_t positions_behind(const Conv& conv, int64_t) { return conv.step * (kPositions + conv.pitch) * conv.words * 4; }

}  // namespace

Kernels bfloat16_amx() { return {true, false, kTileWords, kLanes, 2, 2, positions_behind, rows_of}; }

}  // namespace vlmteacher::surrogate_decoder

#endif
