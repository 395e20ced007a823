// The wide products by AMX; called only on processors that have it. A tile of sums runs over all segments, each filled
// up to whole tiles of 32 elements with zeros.
#if defined(__AMX_BF16__)
#include "../amx.h"
#include "../scratch.h"
#include "wide_pack.h"

namespace vlmteacher::wide {
namespace {

constexpr int64_t kRows = 2 * kTileRows;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Left {  // a segment's rows
  const char* whole;
  int64_t step, tiles;  // bytes from row to row; whole tiles
  const char* rest;     // (rows, 64 bytes), or null
};

}  // namespace

void part_amx(const Product& p, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  const Tiles tiles;
  const int64_t padded = rows < kRows ? kRows : rows;  // fewer rows are copied, and zeros follow them
  int64_t packed_tiles = 0, copied = 0;
  for (int64_t s = 0; s < p.count; ++s) {
    const int64_t words = p.segments[s].k / 2, all = (words + kTileWords - 1) / kTileWords;
    packed_tiles += all;
    copied += padded > rows ? all : words % kTileWords != 0;
  }
  const Scratch packed(packed_tiles * kTileWords * kVectors * 64), copies(copied * padded * 64 + 64);
  const Scratch<Left> lefts(p.count);
  char* to = copies.data;
  for (int64_t s = 0; s < p.count; ++s) {
    const int64_t step = p.segments[s].left_stride * 2, words = p.segments[s].k / 2, whole = words / kTileWords;
    const char* from = static_cast<const char*>(p.segments[s].left) + row * step;
    Left& left = lefts.data[s];
    left = {from, step, whole, nullptr};
    const auto copy = [&](int64_t tile) {  // one tile of all rows
      const int64_t bytes = 4 * least(words - tile * kTileWords, kTileWords);
      std::memset(to, 0, padded * 64);
      for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * 64, from + i * step + tile * 64, bytes);
      to += padded * 64;
      return to - padded * 64;
    };
    if (padded > rows) {
      left = {to, 64, 0, to};
      for (int64_t tile = 0; tile * kTileWords < words; ++tile) copy(tile);
    } else if (words % kTileWords) {
      left.rest = copy(whole);
    }
  }
  alignas(64) float sums[kRows][kColumns];
  for (int64_t column = panel * kColumns; column < p.n && panels > 0; column += kColumns, --panels) {
    const int64_t columns = least(p.n - column, kColumns);
    char* at = packed.data;
    for (int64_t s = 0; s < p.count; ++s) {
      const int64_t words = p.segments[s].k / 2, bytes = words * kVectors * 64;
      const int64_t all = (words + kTileWords - 1) / kTileWords * kTileWords * kVectors * 64;
      pack(p.segments[s], 0, words, column, columns, at);
      std::memset(at + bytes, 0, all - bytes);
      at += all;
    }
    written();
    for (int64_t done = 0; done < rows; done += kRows) {
      const int64_t first = padded > rows ? 0 : least(done, rows - kRows);  // the last rows are computed twice
      const char* right = packed.data;
      zero_sums();
      for (int64_t s = 0; s < p.count; ++s) {
        const Left& left = lefts.data[s];
        const int64_t words = p.segments[s].k / 2, all = (words + kTileWords - 1) / kTileWords;
        if (padded > rows) {
          for (int64_t tile = 0; tile < all; ++tile)
            add_32_by_32(left.rest + tile * padded * 64, 64, right + tile * kTileWords * kVectors * 64, 1);
        } else {
          add_32_by_32(left.whole + first * left.step, left.step, right, left.tiles);
          if (left.rest) add_32_by_32(left.rest + first * 64, 64, right + left.tiles * kTileWords * kVectors * 64, 1);
        }
        right += all * kTileWords * kVectors * 64;
      }
      store_32_by_32(sums[0], sizeof sums[0]);
      for (int64_t v = 0; v < kVectors; ++v) {
        const __mmask16 mask = lanes(columns - v * kLanes);
        const char* from = static_cast<const char*>(p.bias) + 2 * (column + v * kLanes);
        const __m512 bias = p.bias && mask ? BFloat16::load(from, mask) : _mm512_setzero_ps();
        char* out = static_cast<char*>(p.out) + ((row + first) * p.out_stride + column + v * kLanes) * 2;
        for (int64_t i = 0; i < least(rows, kRows); ++i, out += p.out_stride * 2)
          BFloat16::store(out, mask, _mm512_add_ps(_mm512_load_ps(sums[i] + v * kLanes), bias));
      }
    }
  }
}

}  // namespace vlmteacher::wide

#endif
