// The matrix unit of AMX processors: eight tiles of 16 rows of 64 bytes. Only for files compiled with AMX flags. A
// left operand's tile holds 16 rows of 32 bfloat16, a right one's 16 words (two bfloat16 that are adjacent along the
// sum) of 16 columns, a sum's 16 rows of 16 float32.
#pragma once
#include "avx512.h"

namespace vlmteacher {
namespace {

constexpr int64_t kTileRows = 16, kTileWords = 16;

// The tiles of this thread, from here on to the end of the scope, all of full size.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = kTileRows;
    __asm__ volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic does not say how much it reads
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// What was written before is in memory for the tiles to load: GCC's intrinsics do not say that they read it.
inline void written() { __asm__ volatile("" : : : "memory"); }

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// sums (32 rows, 32 columns) in tiles 0 to 3 += left (rows `step` bytes apart, TILES of 16 words) right, packed as
// [word][vector][lane] of two vectors.
inline void add_32_by_32(const char* left, int64_t step, const char* right, int64_t tiles) {
  for (; tiles > 0; --tiles, left += 64, right += 2 * 64 * kTileWords) {
    _tile_loadd(4, left, step);
    _tile_loadd(6, right, 128);
    _tile_loadd(7, right + 64, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + kTileRows * step, step);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The same of one vector of columns, in tiles 0 and 2.
inline void add_32_by_16(const char* left, int64_t step, const char* right, int64_t tiles) {
  for (; tiles > 0; --tiles, left += 64, right += 64 * kTileWords) {
    _tile_loadd(4, left, step);
    _tile_loadd(6, right, 64);
    _tile_loadd(5, left + kTileRows * step, step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
  }
}

// (32, 32) float32 of `step` bytes a row, to tiles 0 to 3.
inline void load_32_by_32(const float* from, int64_t step) {
  const char* const at = reinterpret_cast<const char*>(from);
  written();
  _tile_loadd(0, at, step);
  _tile_loadd(1, at + 64, step);
  _tile_loadd(2, at + kTileRows * step, step);
  _tile_loadd(3, at + kTileRows * step + 64, step);
}

// The same of one vector of columns, to tiles 0 and 2.
inline void load_32_by_16(const float* from, int64_t step) {
  const char* const at = reinterpret_cast<const char*>(from);
  written();
  _tile_loadd(0, at, step);
  _tile_loadd(2, at + kTileRows * step, step);
}

// Tiles 0 to 3, to (32, 32) float32 of `step` bytes a row.
inline void store_32_by_32(float* to, int64_t step) {
  char* const at = reinterpret_cast<char*>(to);
  _tile_stored(0, at, step);
  _tile_stored(1, at + 64, step);
  _tile_stored(2, at + kTileRows * step, step);
  _tile_stored(3, at + kTileRows * step + 64, step);
}

// The same of one vector of columns, from tiles 0 and 2.
inline void store_32_by_16(float* to, int64_t step) {
  char* const at = reinterpret_cast<char*>(to);
  _tile_stored(0, at, step);
  _tile_stored(2, at + kTileRows * step, step);
}

}  // namespace
}  // namespace vlmteacher
