// The kernels for elements of type T, Float32 or BFloat16. Compiled with AVX-512 flags and called only on processors
// that have it: use no library templates here, which the linker could share with code that runs on any processor.
#pragma once
#include <math.h>

#include "../avx512.h"
#include "../scratch.h"
#include "attention.h"

namespace vlmteacher::attention {
namespace {

constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kBlock = 96;   // queries, or keys, of one piece of the work
constexpr int64_t kChunk = 256;  // keys of which the forward holds scores at a time
constexpr double kLog2e = 1.4426950408889634;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Two vectors of a row, 32 elements, to memory.
template <class T>
void store_pair(char* to, __m512 first, __m512 second) {
  if constexpr (T::kDepth == 2) {
    _mm512_storeu_si512(to, T::rounded(first, second));
  } else {
    _mm512_storeu_ps(to, first);
    _mm512_storeu_ps(to + 64, second);
  }
}

// Products of kRows rows of a left operand with a panel of a right one, on some instruction set.
template <class T>
struct Unit {
  static constexpr int64_t kRows = 12;       // 12 x 2 vectors of sums of 32 registers
  static constexpr int64_t kWholeWords = 1;  // sums have a multiple of so many words
  static constexpr int64_t kKeys = kRows;    // and of so many keys
  static constexpr bool kTurns = false;      // a left operand's words must stand together
  struct Session {                           // what a thread does before and after
    Session() {}
  };

  // out (kRows, V vectors) = or += a left operand, whose words are broadcast, times a panel of the right one, packed as
  // [word][vector][lane]. Sums of one run start from zero: short ones round little.
  template <int V>
  static void multiply(bool add, float* out, int64_t stride, const char* left, int64_t row_step, int64_t word_step,
                       const char* panel, int64_t words) {
    constexpr int64_t kRun = T::kDepth == 2 ? 128 : 16;  // words
    for (int64_t stop; words > 0; words -= stop, add = true) {
      __m512 sums[kRows][V];
      UNROLL for (auto& row : sums) UNROLL for (auto& vector : row) vector = _mm512_setzero_ps();
      stop = least(words, kRun);
      for (int64_t word = 0; word < stop; ++word, left += word_step, panel += 64 * V)
        add_word<T>(sums, left, row_step, panel);
      if (add)
        UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int v = 0; v < V; ++v) sums[i][v] =
            _mm512_add_ps(sums[i][v], _mm512_load_ps(out + i * stride + v * kLanes));
      UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int v = 0; v < V; ++v)
          _mm512_store_ps(out + i * stride + v * kLanes, sums[i][v]);
    }
  }
};

// Sizes that follow from a head's width. Sums over `dim` take words of it, results along it are panels of 32 columns.
template <class T>
struct Width {
  int64_t dim, words, columns;
  explicit Width(int64_t dim) : dim(dim), words(up(dim / T::kDepth, Unit<T>::kWholeWords)), columns(up(dim, kLanes)) {}
  int64_t own_words() const { return dim / T::kDepth; }

  // out (kRows, columns) += left right, where right is packed by `pack_pairs` from `total` rows; from word `first` on.
  void add(float* out, const char* left, int64_t row_step, int64_t word_step, const char* right, int64_t total,
           int64_t first, int64_t words) const {
    const auto at = [&](int64_t column, int64_t vectors) {
      return right + (column * (total / T::kDepth) + first * vectors * kLanes) * 4;
    };
    int64_t column = 0;
    for (; column + kPanel <= columns; column += kPanel)
      Unit<T>::template multiply<2>(true, out + column, columns, left, row_step, word_step, at(column, 2), words);
    if (column < columns)
      Unit<T>::template multiply<1>(true, out + column, columns, left, row_step, word_step, at(column, 1), words);
  }
};

// Rows as a right operand for sums over the rows: [panel of columns][word][vector][lane], zeros up to `total` rows.
template <class T>
void pack_pairs(const char* from, int64_t stride, int64_t rows, int64_t total, int64_t dim, char* to) {
  const int64_t columns = up(dim, kLanes);
  for (int64_t column = 0; column < columns; column += kPanel)
    for (int64_t row = 0; row < total; row += T::kDepth)
      for (int64_t c = column; c < least(columns, column + kPanel); c += kLanes, to += 64) {
        const char* first = from + row * stride + c * T::kBytes;
        const char* second = row + 1 < rows ? first + stride : nullptr;
        _mm512_store_si512(to, row < rows ? T::words(first, second, lanes(dim - c)) : _mm512_setzero_si512());
      }
}

// Rows of `own` words as a right operand for sums over their elements: [panel of rows][word][vector][lane], zeros up to
// `total` rows and `words`.
inline void pack_transposed(const char* from, int64_t stride, int64_t rows, int64_t total, int64_t own, int64_t words,
                            char* to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i offset = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(stride)));
  for (int64_t row = 0; row < total; row += kPanel)
    for (int64_t word = 0; word < words; ++word)
      for (int64_t r = row; r < row + kPanel; r += kLanes, to += 64)
        _mm512_store_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), word < own ? lanes(rows - r) : 0,
                                                           offset, from + r * stride + 4 * word, 1));
}

// Rows of `own` bytes beside one another, zeros up to `bytes` and up to `total` rows.
inline void copy_rows(const char* from, int64_t stride, int64_t rows, int64_t total, int64_t own, int64_t bytes,
                      char* to) {
  for (int64_t row = 0; row < rows; ++row) {
    memcpy(to + row * bytes, from + row * stride, own);
    memset(to + row * bytes + own, 0, bytes - own);
  }
  memset(to + rows * bytes, 0, (total - rows) * bytes);
}

// The keys that a group of queries attends to: none of them to any outside of [0, a) and [b, c), all of them to all
// inside of [0, all_a) and [all_b, all_c).
struct Sight {
  int64_t a = 0, b, c = 0, all_a, all_b = 0, all_c;

  Sight(const int32_t* spans, int64_t first, int64_t count, int64_t keys) : b(keys), all_a(keys), all_c(keys) {
    if (!spans) {
      a = keys;
      all_c = 0;
      return;
    }
    for (const int32_t* s = spans + 3 * first; s < spans + 3 * (first + count); s += 3) {
      a = most(a, s[0]);
      all_a = least(all_a, s[0]);
      all_b = most(all_b, s[1]);
      all_c = least(all_c, s[2]);
      if (s[1] < s[2]) {
        b = least(b, s[1]);
        c = most(c, s[2]);
      }
    }
  }
  bool any(int64_t begin, int64_t end) const { return begin < a || (begin < c && end > b); }
  bool all(int64_t begin, int64_t end) const { return end <= all_a || (begin >= all_b && end <= all_c); }
};

// Which of the 16 keys from `key` on a query attends to.
inline __mmask16 sees(const int32_t* span, int64_t key, int64_t keys) {
  if (!span) return lanes(keys - key);
  return lanes(span[0] - key) | (lanes(span[2] - key) & ~lanes(span[1] - key));
}

// ---------------------------------------------------------------------------------------------------- forward

// Of kRows queries against the keys [begin, end), whose panels are in `packed`.
template <class T>
struct ForwardTile {
  static constexpr int64_t kRows = Unit<T>::kRows;
  alignas(
      64) float scores[kRows][kChunk + kLanes];  // not a power of two: rows would fall into the same sets of a cache
  float top[kRows], sum[kRows];
  float* out;  // (kRows, columns)

  void chunk(const Problem& p, const Width<T>& width, const char* q, const int32_t* spans, int64_t rows,
             const char* keys, const char* values, int64_t begin, int64_t end, bool masked) {
    const int64_t count = end - begin, row_bytes = sizeof scores[0];
    for (int64_t j = 0; j < count; j += kPanel)
      Unit<T>::template multiply<2>(false, scores[0] + j, kChunk + kLanes, q, width.words * 4, 4,
                                    keys + (begin + j) * width.words * 4, width.words);
    const float factor = float(p.scale * kLog2e);
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t* span = spans ? spans + 3 * i : nullptr;
      float* row = scores[i];
      __m512 highest = _mm512_set1_ps(-INFINITY);
      for (int64_t j = 0; j < count; j += kLanes) {
        const __mmask16 mask = masked ? sees(span, begin + j, p.keys) : kAll;
        highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_load_ps(row + j));
      }
      const float now = _mm512_reduce_max_ps(highest) * factor;
      const float before = top[i], after = now > before ? now : before;
      const __m512 minus_top = _mm512_set1_ps(after == -INFINITY ? 0 : -after);  // no key so far
      __m512 sums = _mm512_setzero_ps();
      for (int64_t j = 0; j < count; j += kPanel) {
        __m512 e[2];
        UNROLL for (int v = 0; v < 2; ++v) {
          e[v] = exp2<T>(_mm512_fmadd_ps(_mm512_load_ps(row + j + v * kLanes), scale, minus_top));
          if (masked) e[v] = _mm512_maskz_mov_ps(sees(span, begin + j + v * kLanes, p.keys), e[v]);
          sums = _mm512_add_ps(sums, e[v]);
        }
        store_pair<T>(reinterpret_cast<char*>(row) + j * T::kBytes, e[0], e[1]);  // in place of scores already read
      }
      const float shrink = before == -INFINITY ? 0 : exp2f(before - after);
      top[i] = after;
      sum[i] = sum[i] * shrink + _mm512_reduce_add_ps(sums);
      if (shrink != 1)
        for (int64_t c = 0; c < width.columns; c += kLanes) {
          float* at = out + i * width.columns + c;
          _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(shrink)));
        }
    }
    width.add(out, reinterpret_cast<const char*>(scores), row_bytes, 4, values, up(p.keys, kPanel), begin / T::kDepth,
              count / T::kDepth);
  }
};

template <class T>
void forward_of(const Problem& p, int64_t batch, int64_t head, int64_t first, const char* packed) {
  constexpr int64_t kRows = Unit<T>::kRows;
  const typename Unit<T>::Session session;
  const Width<T> width(p.dim);
  const int64_t padded = up(p.keys, kPanel), row_bytes = width.words * 4;
  const char* values = packed + padded * row_bytes;
  const Scratch scratch(kRows * (width.columns * 4 + row_bytes));
  ForwardTile<T> tile;
  tile.out = reinterpret_cast<float*>(scratch.data);
  char* q = scratch.data + kRows * width.columns * 4;
  memset(tile.scores, 0, sizeof tile.scores);
  for (int64_t begin = first; begin < least(p.queries, first + kBlock); begin += kRows) {
    const int64_t rows = least(kRows, p.queries - begin);
    copy_rows(p.q.at(batch, head) + begin * p.q.token, p.q.token, rows, kRows, width.own_words() * 4, row_bytes, q);
    memset(tile.out, 0, kRows * width.columns * 4);
    for (int64_t i = 0; i < kRows; ++i) {
      tile.top[i] = -INFINITY;
      tile.sum[i] = 0;
    }
    const Sight sight(p.spans, begin, rows, p.keys);
    const int32_t* spans = p.spans ? p.spans + 3 * begin : nullptr;
    const auto look = [&](int64_t key, int64_t stop) {
      for (; key < stop; key += kChunk) {
        const int64_t end = least(up(stop, kPanel), key + kChunk);
        tile.chunk(p, width, q, spans, rows, packed, values, key, end, end > p.keys || !sight.all(key, end));
      }
    };
    look(0, sight.a);
    look(most(up(sight.a, kPanel), sight.b / kPanel * kPanel), sight.c);
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = tile.sum[i];
      const float inverse = sum == 0 ? 0 : 1 / sum;  // a NaN stays NaN
      char* to = p.out.at(batch, head) + (begin + i) * p.out.token;
      for (int64_t c = 0; c < width.columns; c += kLanes)
        T::store(to + c * T::kBytes, lanes(p.dim - c),
                 _mm512_mul_ps(_mm512_set1_ps(inverse), _mm512_load_ps(tile.out + i * width.columns + c)));
      const int64_t row = (batch * p.heads + head) * p.queries + begin + i;
      p.top[row] = sum == 0 ? 0 : tile.top[i];
      p.inverse[row] = inverse;
    }
  }
}

// --------------------------------------------------------------------------------------------------- backward

// Of one head: everything that its blocks need, and where the gradients are summed.
template <class T>
struct BackwardHead {
  const char *k, *v;                      // rows (keys, dim), zeros up to whole tiles
  const char* k_pairs;                    // see pack_pairs
  char *q, *grad, *q_pairs, *grad_pairs;  // q and grad: see pack_transposed
  float *top, *inverse, *delta;           // of a query; delta: sum of grad * out
  int32_t *a, *b, *c;                     // the keys that a query attends to
  float *dq, *dk, *dv;                    // (tokens, columns)
};

template <class T>
struct BackwardBlock {
  static constexpr int64_t kRows = Unit<T>::kRows;
  // [key][query], and the same as [word of keys][query]
  alignas(64) char probabilities[kBlock * kBlock * T::kBytes], scores[kBlock * kBlock * T::kBytes];
  alignas(64) char words[kBlock * kBlock * T::kBytes], turned[Unit<T>::kTurns ? kBlock * kBlock * T::kBytes : 64];
  alignas(64) float tile[kRows][kPanel], slope[kRows][kPanel];

  // Keys [j, j + keys), queries [i, i + queries).
  void run(const Problem& p, const Width<T>& width, const BackwardHead<T>& h, int64_t j, int64_t keys, int64_t i,
           int64_t queries, int64_t padded_keys, int64_t padded_queries, bool masked) {
    constexpr int64_t row_bytes = kBlock * T::kBytes;
    const int64_t bytes = width.words * 4;
    for (int64_t key = 0; key < keys; key += kRows)
      for (int64_t query = 0; query < queries; query += kPanel) {
        char* at = probabilities + key * row_bytes + query * T::kBytes;
        probability_tile(p, width, h, j + key, i + query, bytes, at, masked);
        char* score = scores + key * row_bytes + query * T::kBytes;
        score_tile(width, h, j + key, i + query, bytes, score, words + (key / T::kDepth * kBlock + query) * 4);
      }
    for (int64_t key = 0; key < keys; key += kRows) {
      width.add(h.dv + (j + key) * width.columns, probabilities + key * row_bytes, row_bytes, 4, h.grad_pairs,
                padded_queries, i / T::kDepth, queries / T::kDepth);
      width.add(h.dk + (j + key) * width.columns, scores + key * row_bytes, row_bytes, 4, h.q_pairs, padded_queries,
                i / T::kDepth, queries / T::kDepth);
    }
    const char* left = T::kDepth == 2 ? words : scores;
    if constexpr (Unit<T>::kTurns) Unit<T>::turn(words, kBlock * 4, keys / T::kDepth, queries, turned, row_bytes);
    for (int64_t query = 0; query < queries; query += kRows)
      if constexpr (Unit<T>::kTurns)
        width.add(h.dq + (i + query) * width.columns, turned + query * row_bytes, row_bytes, 4, h.k_pairs, padded_keys,
                  j / T::kDepth, keys / T::kDepth);
      else
        width.add(h.dq + (i + query) * width.columns, left + query * 4, 4, kBlock * 4, h.k_pairs, padded_keys,
                  j / T::kDepth, keys / T::kDepth);
  }

  // The softmax, also kept in float32 in `tile`.
  void probability_tile(const Problem& p, const Width<T>& width, const BackwardHead<T>& h, int64_t key, int64_t query,
                        int64_t bytes, char* to, bool masked) {
    Unit<T>::template multiply<2>(false, tile[0], kPanel, h.k + key * bytes, bytes, 4, h.q + query * bytes,
                                  width.words);
    const __m512 scale = _mm512_set1_ps(float(p.scale * kLog2e));
    __m512 top[2], inverse[2];
    __m512i a[2], b[2], c[2];
    UNROLL for (int v = 0; v < 2; ++v) {
      const int64_t at = query + v * kLanes;
      top[v] = _mm512_load_ps(h.top + at);
      inverse[v] = _mm512_load_ps(h.inverse + at);
      a[v] = _mm512_load_si512(h.a + at);
      b[v] = _mm512_load_si512(h.b + at);
      c[v] = _mm512_load_si512(h.c + at);
    }
    for (int64_t r = 0; r < kRows; ++r, to += kBlock * T::kBytes) {
      __m512 e[2];
      const __m512i row = _mm512_set1_epi32(int(key + r));
      UNROLL for (int v = 0; v < 2; ++v) {
        e[v] = exp2<T>(_mm512_fmsub_ps(_mm512_load_ps(tile[r] + v * kLanes), scale, top[v]));
        e[v] = _mm512_mul_ps(e[v], inverse[v]);
        if (masked) {
          const __mmask16 second = _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(b[v], row), row, c[v]);
          e[v] = _mm512_maskz_mov_ps(second | _mm512_cmplt_epi32_mask(row, a[v]), e[v]);
        }
        _mm512_store_ps(tile[r] + v * kLanes, e[v]);
      }
      store_pair<T>(to, e[0], e[1]);
    }
  }

  // The gradient of the scores: tile * (v grad - delta).
  void score_tile(const Width<T>& width, const BackwardHead<T>& h, int64_t key, int64_t query, int64_t bytes, char* to,
                  char* words) {
    Unit<T>::template multiply<2>(false, slope[0], kPanel, h.v + key * bytes, bytes, 4, h.grad + query * bytes,
                                  width.words);
    __m512 delta[2];
    UNROLL for (int v = 0; v < 2; ++v) delta[v] = _mm512_load_ps(h.delta + query + v * kLanes);
    const __m512i interleave =
        _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                          0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    for (int64_t r = 0; r < kRows; r += 2, to += 2 * kBlock * T::kBytes, words += kBlock * 4) {
      __m512 s[2][2];
      UNROLL for (int i = 0; i < 2; ++i) {
        UNROLL for (int v = 0; v < 2; ++v) s[i][v] =
            _mm512_mul_ps(_mm512_load_ps(tile[r + i] + v * kLanes),
                          _mm512_sub_ps(_mm512_load_ps(slope[r + i] + v * kLanes), delta[v]));
        store_pair<T>(to + i * kBlock * T::kBytes, s[i][0], s[i][1]);
      }
      if constexpr (T::kDepth == 2) UNROLL for (int v = 0; v < 2; ++v) {
          const __m512i both = T::rounded(s[0][v], s[1][v]);
          _mm512_store_si512(words + v * 64, _mm512_permutexvar_epi16(interleave, both));
        }
    }
  }
};

template <class T>
void write(const float* from, const Width<T>& width, float factor, int64_t rows, char* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width.columns; c += kLanes)
      T::store(to + i * stride + c * T::kBytes, lanes(width.dim - c),
               _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_load_ps(from + i * width.columns + c)));
}

template <class T>
void backward_of(const Problem& p, int64_t batch, int64_t key_head) {
  constexpr int64_t kRows = Unit<T>::kRows;
  const typename Unit<T>::Session session;
  const Width<T> width(p.dim);
  const int64_t group = p.heads / p.key_heads, bytes = width.words * 4, own = width.own_words();
  const int64_t keys = up(p.keys, Unit<T>::kKeys), queries = up(p.queries, kPanel);  // a block is whole tiles of both
  const int64_t sums = width.columns * 4, pairs = width.columns * T::kBytes, numbers = up(queries * 4, 64);
  const Scratch scratch(int64_t(sizeof(BackwardBlock<T>)) + keys * (2 * bytes + pairs + 2 * sums) +
                        queries * (2 * bytes + 2 * pairs) + (queries + kRows) * sums + 6 * numbers + 17 * 64);
  char* next = scratch.data;
  const auto take = [&](int64_t size) {
    char* found = next;
    next += up(size, 64);
    return found;
  };
  const auto floats = [&](int64_t size) { return reinterpret_cast<float*>(take(size)); };
  const auto integers = [&](int64_t size) { return reinterpret_cast<int32_t*>(take(size)); };
  auto* block = reinterpret_cast<BackwardBlock<T>*>(take(sizeof(BackwardBlock<T>)));
  BackwardHead<T> h;
  char *k = take(keys * bytes), *v = take(keys * bytes), *k_pairs = take(keys * pairs);
  h.k = k;
  h.v = v;
  h.k_pairs = k_pairs;
  h.q = take(queries * bytes);
  h.grad = take(queries * bytes);
  h.q_pairs = take(queries * pairs);
  h.grad_pairs = take(queries * pairs);
  h.top = floats(numbers);
  h.inverse = floats(numbers);
  h.delta = floats(numbers);
  h.a = integers(numbers);
  h.b = integers(numbers);
  h.c = integers(numbers);
  h.dq = floats((queries + kRows) * sums);
  h.dk = floats(keys * sums);
  h.dv = floats(keys * sums);

  copy_rows(p.k.at(batch, key_head), p.k.token, p.keys, keys, own * 4, bytes, k);
  copy_rows(p.v.at(batch, key_head), p.v.token, p.keys, keys, own * 4, bytes, v);
  pack_pairs<T>(p.k.at(batch, key_head), p.k.token, p.keys, keys, p.dim, k_pairs);
  memset(h.dk, 0, keys * sums);
  memset(h.dv, 0, keys * sums);
  for (int64_t i = 0; i < queries; ++i) {
    const bool real = i < p.queries;
    h.a[i] = real ? (p.spans ? p.spans[3 * i] : int32_t(p.keys)) : 0;
    h.b[i] = real && p.spans ? p.spans[3 * i + 1] : 0;
    h.c[i] = real && p.spans ? p.spans[3 * i + 2] : 0;
  }
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    const char *q = p.q.at(batch, head), *grad = p.grad.at(batch, head), *out = p.out.at(batch, head);
    pack_transposed(q, p.q.token, p.queries, queries, own, width.words, h.q);
    pack_transposed(grad, p.grad.token, p.queries, queries, own, width.words, h.grad);
    pack_pairs<T>(q, p.q.token, p.queries, queries, p.dim, h.q_pairs);
    pack_pairs<T>(grad, p.grad.token, p.queries, queries, p.dim, h.grad_pairs);
    for (int64_t i = 0; i < queries; ++i) {
      __m512 sum = _mm512_setzero_ps();
      if (i < p.queries)
        for (int64_t c = 0; c < p.dim; c += kLanes)
          sum = _mm512_fmadd_ps(T::load(grad + i * p.grad.token + c * T::kBytes, lanes(p.dim - c)),
                                T::load(out + i * p.out.token + c * T::kBytes, lanes(p.dim - c)), sum);
      h.delta[i] = _mm512_reduce_add_ps(sum);
      const int64_t row = (batch * p.heads + head) * p.queries + i;
      h.top[i] = i < p.queries ? p.top[row] : 0;
      h.inverse[i] = i < p.queries ? p.inverse[row] : 0;
    }
    memset(h.dq, 0, (queries + kRows) * sums);
    for (int64_t j = 0; j < keys; j += kBlock)
      for (int64_t i = 0; i < queries; i += kBlock) {
        const Sight sight(p.spans, i, least(kBlock, p.queries - i), p.keys);
        const int64_t j_end = least(keys, j + kBlock), i_end = least(queries, i + kBlock);
        if (!sight.any(j, j_end)) continue;
        const bool masked = j_end > p.keys || i_end > p.queries || !sight.all(j, j_end);
        block->run(p, width, h, j, j_end - j, i, i_end - i, keys, queries, masked);
      }
    write<T>(h.dq, width, float(p.scale), p.queries, p.dq.at(batch, head), p.dq.token);
  }
  write<T>(h.dk, width, float(p.scale), p.keys, p.dk.at(batch, key_head), p.dk.token);
  write<T>(h.dv, width, 1, p.keys, p.dv.at(batch, key_head), p.dv.token);
}

template <class T>
void pack_of(const Problem& p, int64_t batch, int64_t key_head, char* to) {
  const Width<T> width(p.dim);
  const int64_t keys = up(p.keys, kPanel);
  pack_transposed(p.k.at(batch, key_head), p.k.token, p.keys, keys, width.own_words(), width.words, to);
  pack_pairs<T>(p.v.at(batch, key_head), p.v.token, p.keys, keys, p.dim, to + keys * width.words * 4);
}

template <class T>
int64_t packed_bytes_of(const Problem& p) {
  const Width<T> width(p.dim);
  return up(p.keys, kPanel) * (width.words * 4 + width.columns * T::kBytes);
}

template <class T>
Kernels kernels() {
  static_assert(kBlock % Unit<T>::kRows == 0 && kBlock % kPanel == 0 && kBlock % Unit<T>::kKeys == 0);
  return {kBlock, packed_bytes_of<T>, pack_of<T>, forward_of<T>, backward_of<T>};
}

}  // namespace
}  // namespace vlmteacher::attention
