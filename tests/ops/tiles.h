// AMX's tile instructions in plain C++, included before everything else of a test build of csrc/*/*_amx.cpp: the same
// shapes, the layout of pairs of bfloat16, and the order of additions. Source: Intel's Architectures Software
// Developer's Manual, volume 2, TDPBF16PS and TILELOADD; numbers below float32's normal range are zeros.
//
// What a real unit leaves undefined or refuses stops the process: a tile that is used before a configuration, or beyond
// its shape.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) char data[16][64];
};

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

inline thread_local Tile tiles[8];

inline void refuse(const char* what) {
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline Tile& configured(int tile) {
  if (tile < 0 || tile > 7 || !tiles[tile].rows) refuse("a tile without a configuration");
  return tiles[tile];
}

inline void configure(const void* from) {
  Config config;
  std::memcpy(&config, from, sizeof config);
  if (config.palette != 1 || config.start_row) refuse("a palette other than 1");
  for (int i = 0; i < 8; ++i) {
    if (config.rows[i] > 16 || config.bytes[i] > 64) refuse("a tile of more than 16 rows of 64 bytes");
    tiles[i].rows = config.rows[i], tiles[i].bytes = config.bytes[i];
    std::memset(tiles[i].data, 0, sizeof tiles[i].data);
  }
}

inline void release() {
  for (Tile& tile : tiles) tile.rows = tile.bytes = 0, std::memset(tile.data, 0xff, sizeof tile.data);
}

inline void zero(int tile) { std::memset(configured(tile).data, 0, sizeof(Tile::data)); }

inline void load(int tile, const void* base, int64_t stride) {
  Tile& t = configured(tile);
  std::memset(t.data, 0, sizeof t.data);
  for (int i = 0; i < t.rows; ++i) std::memcpy(t.data[i], static_cast<const char*>(base) + i * stride, t.bytes);
}

inline void store(int tile, void* base, int64_t stride) {
  const Tile& t = configured(tile);
  for (int i = 0; i < t.rows; ++i) std::memcpy(static_cast<char*>(base) + i * stride, t.data[i], t.bytes);
}

inline float flushed(float x) { return x > -0x1p-126f && x < 0x1p-126f ? 0.f : x; }

inline float half(const char* row, int element) {
  uint16_t bits;
  std::memcpy(&bits, row + 2 * element, 2);
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return flushed(x);
}

// sum (m, n) += left (m, 2 k) right (k, n pairs): the even and the odd products each have a sum of their own.
inline void multiply(int sum, int left, int right) {
  Tile &c = configured(sum), &a = configured(left), &b = configured(right);
  if (a.rows != c.rows || b.bytes != c.bytes || a.bytes != 4 * b.rows) refuse("tiles that do not fit");
  for (int m = 0; m < c.rows; ++m) {
    float even[16] = {}, odd[16] = {}, out[16];
    for (int k = 0; k < b.rows; ++k)
      for (int n = 0; n < c.bytes / 4; ++n) {
        even[n] = flushed(__builtin_fmaf(half(a.data[m], 2 * k), half(b.data[k], 2 * n), even[n]));
        odd[n] = flushed(__builtin_fmaf(half(a.data[m], 2 * k + 1), half(b.data[k], 2 * n + 1), odd[n]));
      }
    std::memcpy(out, c.data[m], c.bytes);
    for (int n = 0; n < c.bytes / 4; ++n) out[n] = flushed(flushed(out[n]) + flushed(even[n] + odd[n]));
    std::memcpy(c.data[m], out, c.bytes);
  }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_dpbf16ps emulated::multiply
