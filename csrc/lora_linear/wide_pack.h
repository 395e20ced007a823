// Panels of the right operand of a wide product, for the files that multiply them by AVX-512 and by AMX.
#pragma once
#include "../avx512.h"
#include "wide.h"

namespace vlmteacher::wide {
namespace {

constexpr int64_t kVectors = kColumns / kLanes;

// Where a panel has a word of a vector: [word / GROUP][vector][word % GROUP][lane].
template <int64_t GROUP>
int64_t place(int64_t word, int64_t vector) {
  return ((word / GROUP * kVectors + vector) * GROUP + word % GROUP) * 64;
}

// Words [first, first + words) of `columns` columns from an operand that is stored (n, k).
template <int64_t GROUP>
void pack_columns(const char* from, int64_t stride, int64_t words, int64_t columns, char* to) {
  for (int64_t v = 0; v < kVectors; ++v)
    for (int64_t word = 0; word < words; word += kLanes) {
      const __mmask16 some = lanes(words - word);
      __m512i rows[16];
      UNROLL for (int i = 0; i < 16; ++i) {
        const bool there = v * kLanes + i < columns;
        rows[i] = there ? _mm512_maskz_loadu_epi32(some, from + (v * kLanes + i) * stride + 4 * word)
                        : _mm512_setzero_si512();
      }
      transpose(rows);
      UNROLL for (int i = 0; i < 16; ++i) {
        if (word + i < words) _mm512_storeu_si512(to + place<GROUP>(word + i, v), rows[i]);
      }
    }
}

// The same from an operand that is stored (k, n).
template <int64_t GROUP>
void pack_rows(const char* from, int64_t stride, int64_t words, int64_t columns, char* to) {
  for (int64_t word = 0; word < words; ++word, from += 2 * stride)
    for (int64_t v = 0; v < kVectors; ++v)
      _mm512_storeu_si512(to + place<GROUP>(word, v),
                          BFloat16::words(from + 32 * v, from + stride + 32 * v, lanes(columns - v * kLanes)));
}

// Words [first, first + words) of a segment's `columns` columns from `column` on.
template <int64_t GROUP>
void pack(const Segment& s, int64_t first, int64_t words, int64_t column, int64_t columns, char* to) {
  const char* right = static_cast<const char*>(s.right);
  if (s.transposed)
    pack_columns<GROUP>(right + 2 * (column * s.right_stride + 2 * first), s.right_stride * 2, words, columns, to);
  else
    pack_rows<GROUP>(right + 2 * (2 * first * s.right_stride + column), s.right_stride * 2, words, columns, to);
}

}  // namespace
}  // namespace vlmteacher::wide
