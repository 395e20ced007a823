// The strip and the end of a convolution of bfloat16, for the files that multiply it by AVX-512 BF16 and by AMX. No
// library templates here, which the linker could share with code that runs on any processor.
#pragma once
#include "../avx512.h"
#include "conv.h"

namespace vlmteacher::surrogate_decoder {
namespace {

// The sign bits of the lanes of a vector, in bytes of their own: behind the last of them nothing is read or written. A
// size that is not known to the compiler is a call, and every sum would go over the stack.
inline __mmask16 load_signs(const uint8_t* signs, __mmask16 some) {
  uint16_t found = *signs;
  if (some > 0xff) std::memcpy(&found, signs, 2);
  return found;
}

inline void store_signs(uint8_t* signs, __mmask16 some, __mmask16 set) {
  const uint16_t bits = set;
  *signs = uint8_t(bits);
  if (some > 0xff) std::memcpy(signs, &bits, 2);
}

// The elements whose sign bit is not set, times the slope.
inline void copy_masked(const char* from, const uint8_t* signs, int64_t count, float slope, char* to) {
  const __m512 factor = _mm512_set1_ps(slope);
  int64_t i = 0;
  if (slope == 0) {
    for (; i + 32 <= count; i += 32) {
      uint32_t mask;
      std::memcpy(&mask, signs + i / 8, 4);
      _mm512_storeu_si512(to + 2 * i, _mm512_maskz_mov_epi16(mask, _mm512_loadu_si512(from + 2 * i)));
    }
    for (; i + kLanes <= count; i += kLanes) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * i));
      const __m256i kept = _mm256_maskz_mov_epi16(load_signs(signs + i / 8, kAll), value);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), kept);
    }
  }
  for (; i < count; i += kLanes) {
    const __mmask16 some = lanes(count - i);
    const __mmask16 set = load_signs(signs + i / 8, some);
    const __m512 value = BFloat16::load(from + i * BFloat16::kBytes, some);
    BFloat16::store(to + i * BFloat16::kBytes, some, _mm512_mask_mul_ps(value, __mmask16(~set), value, factor));
  }
}

inline void fill_strip(const Conv& conv, const Source* sources, int64_t first_row, int64_t count, char* strip) {
  const int64_t pixel = conv.words * 4, own = conv.channels * BFloat16::kBytes, sign_bytes = (conv.channels + 7) / 8;
  const int64_t row_bytes = conv.pitch * pixel;
  const bool whole_rows = conv.sources == 1 && own == pixel && !sources[0].signs;
  for (int64_t r = 0; r < count; ++r, strip += row_bytes) {
    const int64_t row = first_row + r;
    if (row < 0 || row >= conv.in_height) {
      std::memset(strip, 0, row_bytes);
      continue;
    }
    std::memset(strip, 0, pixel);
    std::memset(strip + (conv.in_width + 1) * pixel, 0, row_bytes - (conv.in_width + 1) * pixel);
    char* to = strip + pixel;
    if (whole_rows && sources[0].frame) {
      std::memcpy(to, static_cast<const char*>(sources[0].frame) + row * conv.in_width * own, conv.in_width * own);
      continue;
    }
    for (int64_t s = 0; s < conv.sources; ++s) {
      const Source& source = sources[s];
      for (int64_t x = 0; x < conv.in_width; ++x) {
        const int64_t at = row * conv.in_width + x;
        char* there = to + x * pixel + s * own;
        const char* from = static_cast<const char*>(source.frame) + (source.frame ? at * own : 0);
        if (!source.frame)
          std::memset(there, 0, own);
        else if (source.signs)
          copy_masked(from, source.signs + at * sign_bytes, conv.channels, conv.slope, there);
        else
          std::memcpy(there, from, own);
      }
    }
    if (const int64_t rest = pixel - conv.sources * own)
      for (int64_t x = 0; x < conv.in_width; ++x) std::memset(to + x * pixel + pixel - rest, 0, rest);
  }
}

// Bias, residual and activation of the 16 output channels from `channel` on, of a pixel.
inline void finish(const Conv& conv, const Frame& frame, int64_t pixel, int64_t channel, __m512 value) {
  const __mmask16 mask = lanes(conv.out_channels - channel);
  const __m512 slope = _mm512_set1_ps(conv.slope);
  const int64_t at = (pixel * conv.out_channels + channel) * BFloat16::kBytes;
  const int64_t sign_at = pixel * ((conv.out_channels + 7) / 8) + channel / 8;
  value = _mm512_add_ps(value, _mm512_loadu_ps(conv.bias + channel));
  if (frame.residual) {
    __m512 more = BFloat16::load(static_cast<const char*>(frame.residual) + at, mask);
    if (frame.residual_signs) {
      const __mmask16 set = load_signs(frame.residual_signs + sign_at, mask);
      more = _mm512_mask_mul_ps(more, __mmask16(~set), more, slope);
    }
    value = _mm512_add_ps(value, more);
  }
  if (frame.signs) {
    const __mmask16 set = _mm512_mask_cmp_ps_mask(mask, value, _mm512_setzero_ps(), _CMP_GT_OQ);
    value = _mm512_mask_mul_ps(value, __mmask16(~set), value, slope);
    store_signs(frame.signs + sign_at, mask, set);
  }
  BFloat16::store(static_cast<char*>(frame.out) + at, mask, value);
}

}  // namespace
}  // namespace vlmteacher::surrogate_decoder
