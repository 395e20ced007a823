// Vectors of 16 float32 numbers, loaded from bfloat16 or float32. Only for files compiled with AVX-512 flags: it has
// internal linkage, so that the linker cannot share it with code that runs on any processor, nor what is compiled with
// AVX-512 BF16 flags with what is not.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Forces unrolling: with an index known only at run time the accumulators would be in memory.
#define UNROLL _Pragma("GCC unroll 16")

namespace vlmteacher {
namespace {

constexpr int64_t kLanes = 16;
constexpr __mmask16 kAll = 0xffff;

inline __mmask16 lanes(int64_t count) {
  return count >= kLanes ? kAll : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// A word is a lane of an operand: two bfloat16 that are adjacent along the sum, or one float32.
// Without AVX-512 BF16 a product of words is two of float32.
struct BFloat16 {
  static constexpr int64_t kDepth = 2, kBytes = 2;
#if defined(__AVX512BF16__)
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static __m256i rounded(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }
  static __m512i rounded(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
#else
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(second(a), second(b), _mm512_fmadd_ps(first(a), first(b), sum));
  }
  static __m256i rounded(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);  // ties to even
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(nearest, nan, _mm512_set1_epi32(-1)), 16));
  }
  static __m512i rounded(__m512 first, __m512 second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(first)), rounded(second), 1);
  }
  static __m512 first(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static __m512 second(__m512i words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))));
  }
#endif
  // Full vectors are a separate case: masked accesses of 16-bit elements are slow on some processors.
  static __m512 load(const char* from, __mmask16 mask) {
    const __m256i half = mask == kAll ? _mm256_loadu_si256((const __m256i*)from) : _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store(char* to, __mmask16 mask, __m512 value) {
    const __m256i half = rounded(value);
    mask == kAll ? _mm256_storeu_si256((__m256i*)to, half) : _mm256_mask_storeu_epi16(to, mask, half);
  }
  // The words of 16 columns from rows `first` and `second` (null: zeros) of a matrix.
  static __m512i words(const char* first, const char* second, __mmask16 mask) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
    if (!second) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second)), 16));
  }
};

struct Float32 {
  static constexpr int64_t kDepth = 1, kBytes = 4;
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static __m512 load(const char* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
  static void store(char* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
  static __m512i words(const char* first, const char*, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, first); }
};

// One word of a product: sums (ROWS, VECTORS) += a left operand's word in each of its rows, `step` bytes apart, times a
// panel's vectors of words. Inlined, so that the sums stay in registers.
template <class T, int ROWS, int VECTORS>
__attribute__((always_inline)) inline void add_word(__m512 (&sums)[ROWS][VECTORS], const char* left, int64_t step,
                                                    const char* panel) {
  __m512i right[VECTORS];
  UNROLL for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_si512(panel + 64 * v);
  UNROLL for (int i = 0; i < ROWS; ++i) {
    int32_t word;
    std::memcpy(&word, left + i * step, 4);
    const __m512i broadcast = _mm512_set1_epi32(word);
    UNROLL for (int v = 0; v < VECTORS; ++v) sums[i][v] = T::multiply_add(sums[i][v], broadcast, right[v]);
  }
}

// Rows of 16 words become columns.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 2^x for x far below the float's largest exponent; -inf is not among them.
template <class T>
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p;
  if constexpr (T::kDepth == 2) {  // to be rounded to bfloat16: 4e-7 is enough
    p = _mm512_set1_ps(0.0012692681f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0096565578f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055521049f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022551f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69314677f));
  } else {
    p = _mm512_set1_ps(0.00014788161f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0013385445f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0096204160f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055503771f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022633f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69314718f));
  }
  return _mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1)), whole);
}

}  // namespace
}  // namespace vlmteacher
