// The kernels for elements of type T, Float32 or BFloat16. Compiled with AVX-512 flags and called only on processors
// that have it: use no library templates here, which the linker could share with code that runs on any processor.
#pragma once
#include "../avx512.h"
#include "../scratch.h"
#include "skinny.h"

namespace vlmteacher::skinny {
namespace {

constexpr int64_t kVectors = 3;         // 8 x 3 accumulators of 32 registers
constexpr int64_t kPanels = 256 << 10;  // bytes of packed panels that leave room in the second-level cache

// The words of one run of sums, which starts from zero: short ones round little.
template <class T>
constexpr int64_t kRun = T::kDepth == 2 ? 256 : 16;

// Words of `columns` columns of the stored (k, columns) matrix: to[word][vector][lane], zeros in the unused lanes.
template <class T>
void pack_rows(const char* from, int64_t stride, int64_t k, int64_t columns, int64_t vectors, char* to) {
  for (int64_t row = 0; row < k; row += T::kDepth)
    for (int64_t v = 0; v < vectors; ++v, to += 64) {
      const char* first = from + row * stride + v * kLanes * T::kBytes;
      const char* second = T::kDepth == 2 && row + 1 < k ? first + stride : nullptr;
      _mm512_storeu_si512(to, T::words(first, second, lanes(columns - v * kLanes)));
    }
}

// The same of a matrix that is stored transposed, (columns, k): words stand together already.
void pack_columns(const char* from, int64_t stride, int64_t words, int64_t columns, int64_t vectors, char* to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offset = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(stride)));
  for (int64_t word = 0; word < words; ++word)
    for (int64_t v = 0; v < vectors; ++v, to += 64)
      _mm512_storeu_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes(columns - v * kLanes), offset,
                                                          from + v * kLanes * stride + 4 * word, 1));
}

struct Tile {
  int64_t words;
  const char* left;
  int64_t row_step, word_step;  // bytes
  const char* panel;
  float alpha;
  bool accumulate, wide;
  char* out;
  int64_t out_step;  // bytes
  __mmask16 last;    // the columns in use of the last vector
};

template <class T, int ROWS, int VECTORS>
struct Sums {
  __m512 value[ROWS][VECTORS];

  // The sums over the next `words`, from zero.
  void of(const Tile& t, int64_t words, const char*& left, const char*& panel) {
    UNROLL for (auto& row : value) UNROLL for (auto& vector : row) vector = _mm512_setzero_ps();
    for (; words > 0; --words, left += t.word_step, panel += 64 * VECTORS) add_word<T>(value, left, t.row_step, panel);
  }

  // To `out`, whose elements an Out loads and stores.
  template <class Out, bool Accumulate, bool Full>
  void store(const Tile& t) const {
    const __m512 alpha = _mm512_set1_ps(t.alpha);
    UNROLL for (int i = 0; i < ROWS; ++i) UNROLL for (int v = 0; v < VECTORS; ++v) {
      char* to = t.out + i * t.out_step + v * kLanes * Out::kBytes;
      const __mmask16 mask = Full || v + 1 < VECTORS ? kAll : t.last;
      const __m512 before = Accumulate ? Out::load(to, mask) : _mm512_setzero_ps();
      Out::store(to, mask, _mm512_fmadd_ps(alpha, value[i][v], before));
    }
  }

  template <class Out>
  void store(const Tile& t) const {
    if (t.accumulate)
      t.last == kAll ? store<Out, true, true>(t) : store<Out, true, false>(t);
    else
      t.last == kAll ? store<Out, false, true>(t) : store<Out, false, false>(t);
  }
};

template <class T, int ROWS, int VECTORS>
void run(const Tile& t) {
  const char *left = t.left, *panel = t.panel;
  Sums<T, ROWS, VECTORS> total;
  total.of(t, t.words < kRun<T> ? t.words : kRun<T>, left, panel);
  for (int64_t begin = kRun<T>; begin < t.words; begin += kRun<T>) {
    Sums<T, ROWS, VECTORS> next;
    next.of(t, t.words - begin < kRun<T> ? t.words - begin : kRun<T>, left, panel);
    UNROLL for (int i = 0; i < ROWS; ++i) UNROLL for (int v = 0; v < VECTORS; ++v) total.value[i][v] =
        _mm512_add_ps(total.value[i][v], next.value[i][v]);
  }
  t.wide ? total.template store<Float32>(t) : total.template store<T>(t);
}

template <class T, int ROWS, int VECTORS>
void run_rows(Tile t, int64_t rows) {
  for (; rows >= ROWS; rows -= ROWS, t.left += ROWS * t.row_step, t.out += ROWS * t.out_step) run<T, ROWS, VECTORS>(t);
  for (; rows > 0; --rows, t.left += t.row_step, t.out += t.out_step) run<T, 1, VECTORS>(t);
}

// As many rows at a time as leave registers for the right operand and the broadcast.
template <class T>
void run_panel(const Tile& t, int64_t vectors, int64_t rows) {
  if (vectors == 4) run_rows<T, 6, 4>(t, rows);
  if (vectors == 3) run_rows<T, 8, 3>(t, rows);
  if (vectors == 2) run_rows<T, 12, 2>(t, rows);
  if (vectors == 1) run_rows<T, 12, 1>(t, rows);
}

template <class T>
void product_of(int64_t m, int64_t n, int64_t k, float alpha, const Matrix& left, const Matrix& right, bool accumulate,
                void* out, int64_t out_stride, bool wide) {
  const int64_t out_bytes = wide ? Float32::kBytes : T::kBytes;
  const int64_t words = (k + T::kDepth - 1) / T::kDepth;
  const bool pack_left = left.transposed && T::kDepth == 2;  // words of a transposed operand do not stand together
  const int64_t block = pack_left && m > 96 ? 96 : m;  // rows at a time, so that the packed ones stay in the cache
  const int64_t left_vectors = (block + kLanes - 1) / kLanes;
  const int64_t right_vectors = (n + kLanes - 1) / kLanes;
  // Where the sums are short, reading and writing `out` is most of the work: whole rows of it then, and panels of two
  // cache lines.
  const bool wide_rows = right_vectors > kVectors && words * right_vectors * 64 <= kPanels;
  const int64_t most = wide_rows ? 4 : kVectors, panel_bytes = words * 64 * most;
  const Scratch panel_memory(wide_rows ? words * 64 * (right_vectors + most) : panel_bytes);
  const Scratch pair_memory(pack_left ? words * 64 * left_vectors : 0);
  char *const panels = panel_memory.data, *const pairs = pair_memory.data;
  const int64_t left_step = left.stride * T::kBytes, right_step = right.stride * T::kBytes;
  const auto pack = [&](int64_t column, int64_t columns, char* to) {
    const char* source = static_cast<const char*>(right.data);
    const int64_t vectors = (columns + kLanes - 1) / kLanes;
    if (right.transposed)
      pack_columns(source + column * right_step, right_step, words, columns, vectors, to);
    else
      pack_rows<T>(source + column * T::kBytes, right_step, k, columns, vectors, to);
  };
  const auto columns_at = [&](int64_t column) { return n - column < most * kLanes ? n - column : most * kLanes; };
  if (wide_rows)
    for (int64_t column = 0; column < n; column += most * kLanes)
      pack(column, columns_at(column), panels + column / (most * kLanes) * panel_bytes);
  for (int64_t row = 0; row < m; row += block) {
    const int64_t rows = m - row < block ? m - row : block;
    const char* from = static_cast<const char*>(left.data) + row * (left.transposed ? T::kBytes : left_step);
    Tile t{words, from, left_step, 4, panels, alpha, accumulate, wide, nullptr, out_stride * out_bytes, 0};
    if (left.transposed) {
      t.row_step = 4;
      t.word_step = pack_left ? 64 * left_vectors : left_step;
    }
    if (pack_left) {
      t.left = pairs;
      pack_rows<T>(from, left_step, k, rows, left_vectors, pairs);
    }
    const int64_t run_of_rows = wide_rows ? 6 : rows;
    for (int64_t done = 0; done < rows; done += run_of_rows, t.left += run_of_rows * t.row_step)
      for (int64_t column = 0; column < n; column += most * kLanes) {
        const int64_t columns = columns_at(column), vectors = (columns + kLanes - 1) / kLanes;
        if (wide_rows)
          t.panel = panels + column / (most * kLanes) * panel_bytes;
        else
          pack(column, columns, panels);
        t.out = static_cast<char*>(out) + ((row + done) * out_stride + column) * out_bytes;
        t.last = lanes(columns - (vectors - 1) * kLanes);
        run_panel<T>(t, vectors, rows - done < run_of_rows ? rows - done : run_of_rows);
      }
  }
}

inline void round_of(const float* from, int64_t count, float factor, void* to) {
  const __m512 factors = _mm512_set1_ps(factor);
  for (; count > 0; count -= kLanes, from += kLanes, to = static_cast<char*>(to) + 2 * kLanes)
    BFloat16::store(static_cast<char*>(to), lanes(count),
                    _mm512_mul_ps(factors, Float32::load(reinterpret_cast<const char*>(from), lanes(count))));
}

}  // namespace
}  // namespace vlmteacher::skinny
