// Compiled with AVX-512 flags and called only where they hold: keep library templates out of it, which the linker could
// share with code that runs anywhere.
#include "skinny.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <cstdlib>
#include <cstring>

namespace vlmteacher::skinny {
namespace {

constexpr int64_t kLanes = 16, kRows = 8,
                  kVectors = 3;  // 8 x 3 accumulators of 32 registers

// A word is what one lane holds: two bfloat16 that follow each other along k, or one float32.
struct BFloat16 {
  static constexpr int64_t kDepth = 2, kBytes = 2, kRun = 256;
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static __m512 load(const char* from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
  }
  static void store(char* to, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
  }
  // The words of 16 columns from rows `first` and `second` (null: zeros) of a matrix.
  static __m512i words(const char* first, const char* second, __mmask16 mask) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
    if (!second) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second)), 16));
  }
};

struct Float32 {
  static constexpr int64_t kDepth = 1, kBytes = 4, kRun = 32;
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static __m512 load(const char* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
  static void store(char* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
  static __m512i words(const char* first, const char*, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, first); }
};

__mmask16 mask_of(int64_t columns) { return columns >= kLanes ? __mmask16(0xffff) : __mmask16((1u << columns) - 1); }

// Words of `columns` columns of the stored (k, columns) matrix: to[word][vector][lane], zeros in the unused lanes.
template <class T>
void pack_rows(const char* from, int64_t stride, int64_t k, int64_t columns, int64_t vectors, char* to) {
  for (int64_t row = 0; row < k; row += T::kDepth)
    for (int64_t v = 0; v < vectors; ++v, to += 64) {
      const char* first = from + row * stride + v * kLanes * T::kBytes;
      const char* second = T::kDepth == 2 && row + 1 < k ? first + stride : nullptr;
      _mm512_storeu_si512(to, T::words(first, second, mask_of(columns - v * kLanes)));
    }
}

// The same of a matrix that is stored transposed, (columns, k): words stand together already.
void pack_columns(const char* from, int64_t stride, int64_t words, int64_t columns, int64_t vectors, char* to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offset = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(stride)));
  for (int64_t word = 0; word < words; ++word)
    for (int64_t v = 0; v < vectors; ++v, to += 64)
      _mm512_storeu_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask_of(columns - v * kLanes), offset,
                                                          from + v * kLanes * stride + 4 * word, 1));
}

struct Tile {
  int64_t words;
  const char* left;
  int64_t row_step, word_step;  // bytes
  const char* panel;
  float alpha;
  bool accumulate;
  char* out;
  int64_t out_step;  // bytes
  __mmask16 last;    // the columns in use of the last vector
};

template <class T, int ROWS, int VECTORS>
struct Sums {
  __m512 value[ROWS][VECTORS];

  // The sums over the next `words`, from zero.
  void of(const Tile& t, int64_t words, const char*& left, const char*& panel) {
    for (auto& row : value)
      for (auto& vector : row) vector = _mm512_setzero_ps();
    for (; words > 0; --words, left += t.word_step, panel += 64 * VECTORS) {
      __m512i right[VECTORS];
      for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_si512(panel + 64 * v);
      for (int i = 0; i < ROWS; ++i) {
        int32_t word;
        std::memcpy(&word, left + i * t.row_step, 4);
        const __m512i broadcast = _mm512_set1_epi32(word);
        for (int v = 0; v < VECTORS; ++v) value[i][v] = T::multiply_add(value[i][v], broadcast, right[v]);
      }
    }
  }
};

template <class T, int ROWS, int VECTORS>
void run(const Tile& t) {
  const char *left = t.left, *panel = t.panel;
  Sums<T, ROWS, VECTORS> total;
  total.of(t, t.words < T::kRun ? t.words : T::kRun, left, panel);
  for (int64_t begin = T::kRun; begin < t.words; begin += T::kRun) {
    Sums<T, ROWS, VECTORS> next;
    next.of(t, t.words - begin < T::kRun ? t.words - begin : T::kRun, left, panel);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECTORS; ++v) total.value[i][v] = _mm512_add_ps(total.value[i][v], next.value[i][v]);
  }
  const __m512 alpha = _mm512_set1_ps(t.alpha);
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      char* to = t.out + i * t.out_step + v * kLanes * T::kBytes;
      const __mmask16 mask = v + 1 == VECTORS ? t.last : __mmask16(0xffff);
      const __m512 before = t.accumulate ? T::load(to, mask) : _mm512_setzero_ps();
      T::store(to, mask, _mm512_fmadd_ps(alpha, total.value[i][v], before));
    }
}

template <class T, int ROWS, int VECTORS>
void run_rows(Tile t, int64_t rows) {
  for (; rows >= ROWS; rows -= ROWS, t.left += ROWS * t.row_step, t.out += ROWS * t.out_step) run<T, ROWS, VECTORS>(t);
  for (; rows > 0; --rows, t.left += t.row_step, t.out += t.out_step) run<T, 1, VECTORS>(t);
}

char* scratch(int64_t bytes) { return static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)); }

template <class T>
void product_of(int64_t m, int64_t n, int64_t k, float alpha, const Matrix& left, const Matrix& right, bool accumulate,
                void* out, int64_t out_stride) {
  const int64_t words = (k + T::kDepth - 1) / T::kDepth;
  const bool pack_left = left.transposed && T::kDepth == 2;  // words of a transposed operand do not stand together
  const int64_t block = pack_left && m > 96 ? 96 : m;  // rows at a time, so that the packed ones stay in the cache
  const int64_t left_vectors = (block + kLanes - 1) / kLanes;
  const int64_t right_vectors = (n + kLanes - 1) / kLanes;
  char* panel = scratch(words * 64 * (right_vectors < kVectors ? right_vectors : kVectors));
  char* pairs = pack_left ? scratch(words * 64 * left_vectors) : nullptr;
  const int64_t left_step = left.stride * T::kBytes, right_step = right.stride * T::kBytes;
  for (int64_t row = 0; row < m; row += block) {
    const int64_t rows = m - row < block ? m - row : block;
    const char* from = static_cast<const char*>(left.data) + row * (left.transposed ? T::kBytes : left_step);
    Tile t{words, from, left_step, 4, panel, alpha, accumulate, nullptr, out_stride * T::kBytes, 0};
    if (left.transposed) {
      t.row_step = 4;
      t.word_step = pack_left ? 64 * left_vectors : left_step;
    }
    if (pack_left) {
      t.left = pairs;
      pack_rows<T>(from, left_step, k, rows, left_vectors, pairs);
    }
    for (int64_t column = 0; column < n; column += kVectors * kLanes) {
      const int64_t columns = n - column < kVectors * kLanes ? n - column : kVectors * kLanes;
      const int64_t vectors = (columns + kLanes - 1) / kLanes;
      const char* source = static_cast<const char*>(right.data);
      if (right.transposed)
        pack_columns(source + column * right_step, right_step, words, columns, vectors, panel);
      else
        pack_rows<T>(source + column * T::kBytes, right_step, k, columns, vectors, panel);
      t.out = static_cast<char*>(out) + (row * out_stride + column) * T::kBytes;
      t.last = mask_of(columns - (vectors - 1) * kLanes);
      // as many rows as leave registers for the right operand and the broadcast
      if (vectors == 4) run_rows<T, 6, 4>(t, rows);
      if (vectors == 3) run_rows<T, 8, 3>(t, rows);
      if (vectors == 2) run_rows<T, 12, 2>(t, rows);
      if (vectors == 1) run_rows<T, 12, 1>(t, rows);
    }
  }
  std::free(pairs);
  std::free(panel);
}

}  // namespace

bool available() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}

void product(bool half, int64_t m, int64_t n, int64_t k, float alpha, const Matrix& left, const Matrix& right,
             bool accumulate, void* out, int64_t out_stride) {
  (half ? product_of<BFloat16> : product_of<Float32>)(m, n, k, alpha, left, right, accumulate, out, out_stride);
}

}  // namespace vlmteacher::skinny

#else

namespace vlmteacher::skinny {
bool available() { return false; }
void product(bool, int64_t, int64_t, int64_t, float, const Matrix&, const Matrix&, bool, void*, int64_t) {}
}  // namespace vlmteacher::skinny

#endif
