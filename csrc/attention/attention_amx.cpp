// Attention in bfloat16 by AMX; called only on processors that have it. The products are on tiles, the softmax is
// AVX-512's.
#if defined(__AMX_BF16__)
#include "../amx.h"
#include "attention_avx512.h"

namespace vlmteacher::attention {
namespace {

struct TiledBFloat16 : BFloat16 {};

template <>
struct Unit<TiledBFloat16> {
  static constexpr int64_t kRows = 2 * kTileRows, kWholeWords = kTileWords, kKeys = 2 * kTileWords;
  static constexpr bool kTurns = true;
  using Session = Tiles;

  // See Unit; the left operand's words stand together, and `words` is whole tiles of them. Four sums at a time: one
  // takes three times as long as the next may follow it.
  template <int V>
  static void multiply(bool add, float* out, int64_t stride, const char* left, int64_t row_step, int64_t,
                       const char* panel, int64_t words) {
    written();
    if (!add) zero_sums();
    if constexpr (V == 2) {
      if (add) load_32_by_32(out, stride * 4);
      add_32_by_32(left, row_step, panel, words / kTileWords);
      store_32_by_32(out, stride * 4);
    } else {
      if (add) load_32_by_16(out, stride * 4);
      add_32_by_16(left, row_step, panel, words / kTileWords);
      store_32_by_16(out, stride * 4);
    }
  }

  // Words (rows, columns), `step` bytes from row to row, to (columns, rows).
  static void turn(const char* from, int64_t step, int64_t rows, int64_t columns, char* to, int64_t to_step) {
    for (int64_t row = 0; row < rows; row += 16)
      for (int64_t column = 0; column < columns; column += 16) {
        __m512i square[16];
        UNROLL for (int i = 0; i < 16; ++i) square[i] = _mm512_load_si512(from + (row + i) * step + column * 4);
        transpose(square);
        UNROLL for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (column + i) * to_step + row * 4, square[i]);
      }
  }
};

}  // namespace

Kernels bfloat16_amx() { return kernels<TiledBFloat16>(); }

}  // namespace vlmteacher::attention

#endif
