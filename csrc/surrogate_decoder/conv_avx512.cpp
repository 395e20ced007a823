// Compiled with AVX-512 flags and called only on processors that have it: use no library templates here, which the
// linker could share with code that runs on any processor.
#include "conv.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "../bf16_avx512.h"

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

// Whether all products go into one sum: bfloat16's are coarser than what a long sum loses.
template <class T>
constexpr bool kLongSums = T::kDepth == 2;

// A product of float32 with one operand broadcast from memory: beside two sums GCC 12 keeps `right` on the stack, two
// loads a product. It loses with fewer pixels, and with bfloat16's product.
inline void multiply_add(__m512& sum, const char* word, __m512i right) {
  using Word = int32_t __attribute__((may_alias, aligned(1)));
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(right), "m"(*reinterpret_cast<const Word*>(word)));
}

// The elements whose sign bit is not set, times the slope.
template <class T>
void copy_masked(const char* from, const uint8_t* signs, int64_t count, float slope, char* to) {
  const __m512 factor = _mm512_set1_ps(slope);
  int64_t i = 0;
  if (T::kBytes == 2 && slope == 0) {
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
    const __m512 value = T::load(from + i * T::kBytes, some);
    T::store(to + i * T::kBytes, some, _mm512_mask_mul_ps(value, __mmask16(~set), value, factor));
  }
}

template <class T>
void fill_strip(const Conv& conv, const Source* sources, int64_t first_row, int64_t count, char* strip) {
  const int64_t pixel = conv.words() * 4, own = conv.channels * T::kBytes, sign_bytes = (conv.channels + 7) / 8;
  const int64_t row_bytes = (conv.in_width + 2) * pixel;
  const bool whole_rows = conv.sources == 1 && own == pixel && !sources[0].signs;
  for (int64_t r = 0; r < count; ++r, strip += row_bytes) {
    const int64_t row = first_row + r;
    if (row < 0 || row >= conv.in_height) {
      std::memset(strip, 0, row_bytes);
      continue;
    }
    std::memset(strip, 0, pixel);
    std::memset(strip + row_bytes - pixel, 0, pixel);
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
          copy_masked<T>(from, source.signs + at * sign_bytes, conv.channels, conv.slope, there);
        else
          std::memcpy(there, from, own);
      }
    }
    if (const int64_t rest = pixel - conv.sources * own)
      for (int64_t x = 0; x < conv.in_width; ++x) std::memset(to + x * pixel + pixel - rest, 0, rest);
  }
}

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

template <class T, int PIXELS, int VECTORS>
struct Sums {
  __m512 value[PIXELS][VECTORS];

  void clear() { UNROLL for (auto& pixel : value) UNROLL for (auto& vector : pixel) vector = _mm512_setzero_ps(); }

  void add(const char* left, int64_t step, const char*& panel, int64_t words) {
    for (; words > 0; --words, left += 4, panel += 64 * VECTORS) {
      __m512i right[VECTORS];
      UNROLL for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_si512(panel + 64 * v);
      if constexpr (VECTORS == 1 && PIXELS == 12 && !kLongSums<T>) {
        UNROLL for (int i = 0; i < PIXELS; ++i) multiply_add(value[i][0], left + i * step, right[0]);
        continue;
      }
      UNROLL for (int i = 0; i < PIXELS; ++i) {
        int32_t word;
        std::memcpy(&word, left + i * step, 4);
        const __m512i broadcast = _mm512_set1_epi32(word);
        UNROLL for (int v = 0; v < VECTORS; ++v) value[i][v] = T::multiply_add(value[i][v], broadcast, right[v]);
      }
    }
  }
};

template <class T, int PIXELS, int VECTORS>
void run(const Tile& t) {
  const Conv& conv = *t.conv;
  const int64_t step = conv.step * t.pixel_bytes;
  const char* panel = t.panel;
  // What the end of this function will touch is not in the cache yet.
  UNROLL for (int i = 0; i < PIXELS; ++i) {
    const int64_t at = ((t.pixel + i * conv.out_step) * conv.out_channels + t.channel) * T::kBytes;
    if (t.frame->residual) _mm_prefetch(static_cast<const char*>(t.frame->residual) + at, _MM_HINT_T0);
    __builtin_prefetch(static_cast<char*>(t.frame->out) + at, 1);
  }
  Sums<T, PIXELS, VECTORS> total;
  total.clear();
  for (int64_t k = 0; k < conv.taps; ++k) {
    const char* left = t.strip + t.tap[k].row * t.row_bytes + t.tap[k].column * t.pixel_bytes + 4 * t.skipped;
    panel += 64 * VECTORS * t.skipped;
    if constexpr (kLongSums<T>) {
      total.add(left, step, panel, t.words);
    } else {
      Sums<T, PIXELS, VECTORS> part;
      part.clear();
      part.add(left, step, panel, t.words);
      UNROLL for (int i = 0; i < PIXELS; ++i) UNROLL for (int v = 0; v < VECTORS; ++v) total.value[i][v] =
          _mm512_add_ps(total.value[i][v], part.value[i][v]);
    }
    panel += 64 * VECTORS * t.left_out;
  }
  const int64_t channels = conv.out_channels, sign_bytes = (channels + 7) / 8;
  const __m512 slope = _mm512_set1_ps(conv.slope);
  __m512 bias[VECTORS];
  __mmask16 mask[VECTORS];
  UNROLL for (int v = 0; v < VECTORS; ++v) {
    bias[v] = _mm512_loadu_ps(conv.bias + t.channel + v * kLanes);
    mask[v] = lanes(channels - t.channel - v * kLanes);
  }
  UNROLL for (int i = 0; i < PIXELS; ++i) {
    const int64_t pixel = t.pixel + i * conv.out_step;
    UNROLL for (int v = 0; v < VECTORS; ++v) {
      const int64_t channel = t.channel + v * kLanes, at = (pixel * channels + channel) * T::kBytes;
      __m512 value = _mm512_add_ps(total.value[i][v], bias[v]);
      if (t.frame->residual) {
        __m512 more = T::load(static_cast<const char*>(t.frame->residual) + at, mask[v]);
        if (t.frame->residual_signs) {
          const __mmask16 set = load_signs(t.frame->residual_signs + pixel * sign_bytes + channel / 8, mask[v]);
          more = _mm512_mask_mul_ps(more, __mmask16(~set), more, slope);
        }
        value = _mm512_add_ps(value, more);
      }
      if (t.frame->signs) {
        const __mmask16 set = _mm512_mask_cmp_ps_mask(mask[v], value, _mm512_setzero_ps(), _CMP_GT_OQ);
        value = _mm512_mask_mul_ps(value, __mmask16(~set), value, slope);
        store_signs(t.frame->signs + pixel * sign_bytes + channel / 8, mask[v], set);
      }
      T::store(static_cast<char*>(t.frame->out) + at, mask[v], value);
    }
  }
}

template <class T, int VECTORS>
void run_row(Tile t, int64_t pixels) {
  const auto go = [&](auto function, int64_t count) {
    function(t);
    pixels -= count;
    t.strip += count * t.conv->step * t.pixel_bytes;
    t.pixel += count * t.conv->out_step;
  };
  if constexpr (VECTORS < 3)
    while (pixels >= 12 && pixels != 16) go(run<T, 12, VECTORS>, 12);
  while (pixels >= 8) go(run<T, 8, VECTORS>, 8);
  if (pixels >= 4) go(run<T, 4, VECTORS>, 4);
  while (pixels > 0) go(run<T, 1, VECTORS>, 1);
}

template <class T>
void rows_of(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, char* strip) {
  fill_strip<T>(conv, frame.sources, conv.step * begin - 1, conv.strip_rows(end - begin), strip);
  const int64_t pixel = conv.words() * 4, row = (conv.in_width + 2) * pixel, out_width = conv.width * conv.out_step;
  const char* panel = reinterpret_cast<const char*>(conv.weights);
  int64_t first = 0, end_word = conv.words();  // of two sources one may be missing
  if (conv.sources == 2 && !frame.sources[0].frame) first = conv.channels * T::kBytes / 4;
  if (conv.sources == 2 && !frame.sources[1].frame) end_word = (conv.channels * T::kBytes + 3) / 4;
  for (int64_t phase = 0; phase < conv.phases; ++phase)
    for (int64_t channel = 0, vectors; channel < conv.out_channels; channel += vectors * kLanes) {
      vectors = panel_vectors((conv.out_channels - channel + kLanes - 1) / kLanes);
      for (int64_t i = begin; i < end; ++i) {
        Tile t{&conv,
               &frame,
               conv.tap + phase * conv.taps,
               strip + ((i - begin) * conv.step + 1) * row + pixel,
               row,
               pixel,
               first,
               end_word - first,
               conv.words() - end_word,
               panel,
               0,
               channel};
        t.pixel = (i * conv.out_step + phase / 2) * out_width + phase % 2;
        (vectors == 3 ? run_row<T, 3> : vectors == 2 ? run_row<T, 2> : run_row<T, 1>)(t, conv.width);
      }
      panel += conv.taps * conv.words() * vectors * 64;
    }
}

}  // namespace

bool available() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}

void rows(const Conv& conv, const Frame& frame, int64_t begin, int64_t end, char* strip) {
  (conv.half ? rows_of<BFloat16> : rows_of<Float32>)(conv, frame, begin, end, strip);
}

}  // namespace vlmteacher::surrogate_decoder

#else

namespace vlmteacher::surrogate_decoder {
bool available() { return false; }
void rows(const Conv&, const Frame&, int64_t, int64_t, char*) {}
}  // namespace vlmteacher::surrogate_decoder

#endif
