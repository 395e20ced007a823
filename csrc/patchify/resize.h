// Resizing a plane on the CPU: Y X Z^T with two banded matrices. The definition is vlmteacher/ops/patchify.py.
//
// The vertical map adds up whole rows. The horizontal one first turns a few rows into columns, so that it adds up
// vectors too: rows lie in the lanes. Included by cpu.cpp and by resize_avx512.cpp, which compile it for different
// processors: hence the unnamed namespace, and no library templates, which the linker could share between the two.
#pragma once

#include <cstdint>
#include <cstring>

namespace vlmteacher::resize {

template <class A>
struct Band {  // row i has weight[i * taps + k] at column start[i] + k; start ascends
  const int32_t* start;
  const A* weight;
  int64_t rows, columns, taps;
};

template <class A>
struct Part {  // output rows [begin, end) of a plane, and what a value v of theirs becomes: v * scale + shift
  int64_t begin, end;
  A scale, shift;
};

// from[0], from[1], ... are the input rows from y.start[begin] on; `to` is contiguous, `scratch` of `scratch_size`.
void resample_avx512(const float* const* from, const Band<float>& y, const Band<float>& x, const Part<float>& part,
                     float* scratch, float* to);
bool has_avx512();  // this processor, and this build

namespace {

template <class A>
inline constexpr int64_t kLanes = 64 / sizeof(A);

template <class A>
int64_t rows_read(const Band<A>& y, const Part<A>& part) {
  return y.start[part.end - 1] + y.taps - y.start[part.begin];
}

template <class A>
int64_t scratch_size(const Band<A>& y, const Band<A>& x, const Part<A>& part) {
  const int64_t from = rows_read(y, part), to = part.end - part.begin;
  return (from < to ? from * x.rows : to * x.columns) + x.columns * kLanes<A>;
}

// 64 bytes, as many vectors of the processor as it takes; `Anywhere` is the same, however aligned.
template <class A>
struct Vectors {
  typedef A Vector __attribute__((vector_size(64)));
  typedef A Anywhere __attribute__((vector_size(64), aligned(alignof(A)), may_alias));
};
template <class A>
using Vector = typename Vectors<A>::Vector;
template <class A>
using Anywhere = typename Vectors<A>::Anywhere;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define INTERLEAVES
#endif
#endif

// A square of as many vectors as lanes, transposed: to deal the first and the second half like cards, log2(lanes) times.
template <class A>
inline __attribute__((always_inline)) void transpose(Vector<A> (&v)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
  Vector<A> dealt[L];
#ifdef INTERLEAVES
#pragma GCC unroll 4
  for (int step = 1; step < L; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      if constexpr (L == 16) {
        dealt[2 * i] =
            __builtin_shufflevector(v[i], v[i + L / 2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        dealt[2 * i + 1] = __builtin_shufflevector(v[i], v[i + L / 2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                                   30, 15, 31);
      } else {
        dealt[2 * i] = __builtin_shufflevector(v[i], v[i + L / 2], 0, 8, 1, 9, 2, 10, 3, 11);
        dealt[2 * i + 1] = __builtin_shufflevector(v[i], v[i + L / 2], 4, 12, 5, 13, 6, 14, 7, 15);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = dealt[i];
  }
#else
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) dealt[i][j] = v[j][i];
  for (int i = 0; i < L; ++i) v[i] = dealt[i];
#endif
}
#undef INTERLEAVES

template <class A>
const Anywhere<A>& at(const A* from) {
  return *reinterpret_cast<const Anywhere<A>*>(from);
}

template <class A>
Anywhere<A>& at(A* to) {
  return *reinterpret_cast<Anywhere<A>*>(to);
}

// to (width, lanes) from `count` rows of which the last stands for those that are missing.
template <class A>
void columns_of(const A* const* rows, int64_t count, int64_t width, A* to) {
  constexpr int64_t L = kLanes<A>;
  const A* from[L];
  for (int64_t i = 0; i < L; ++i) from[i] = rows[i < count ? i : count - 1];
  int64_t x = 0;
  for (; x + L <= width; x += L) {
    Vector<A> v[L];
    for (int64_t i = 0; i < L; ++i) v[i] = at(from[i] + x);
    transpose<A>(v);
    for (int64_t i = 0; i < L; ++i) at(to + (x + i) * L) = v[i];
  }
  for (; x < width; ++x)
    for (int64_t i = 0; i < L; ++i) to[x * L + i] = from[i][x];
}

template <class A>
void vertical(const A* const* from, const Band<A>& y, const Part<A>& part, int64_t width, A* to) {
  constexpr int64_t L = kLanes<A>;
  const A scale = part.scale, shift = part.shift;
  for (int64_t row = part.begin; row < part.end; ++row, to += width) {
    const A* const weight = y.weight + row * y.taps;
    const A* const* const rows = from + (y.start[row] - y.start[part.begin]);
    int64_t x = 0;
    for (; x + 2 * L <= width; x += 2 * L) {
      Vector<A> sum = {}, next = {};
      for (int64_t k = 0; k < y.taps; ++k) {
        sum += weight[k] * at(rows[k] + x);
        next += weight[k] * at(rows[k] + x + L);
      }
      at(to + x) = sum * scale + shift;
      at(to + x + L) = next * scale + shift;
    }
    for (; x < width; ++x) {
      A sum = 0;
      for (int64_t k = 0; k < y.taps; ++k) sum += weight[k] * rows[k][x];
      to[x] = sum * scale + shift;
    }
  }
}

template <class A>
void horizontal(const A* const* from, int64_t count, const Band<A>& x, A scale, A shift, A* columns, A* to) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t row = 0; row < count; row += L, from += L, to += L * x.rows) {
    const int64_t lanes = count - row < L ? count - row : L;
    columns_of(from, lanes, x.columns, columns);
    for (int64_t begin = 0; begin < x.rows; begin += L) {
      const int64_t some = x.rows - begin < L ? x.rows - begin : L;
      Vector<A> tile[L] = {};
      for (int64_t o = 0; o < some; ++o) {
        const A* const weight = x.weight + (begin + o) * x.taps;
        const A* const column = columns + x.start[begin + o] * L;
        Vector<A> sum = {};
        for (int64_t k = 0; k < x.taps; ++k) sum += weight[k] * at(column + k * L);
        tile[o] = sum * scale + shift;
      }
      transpose<A>(tile);
      for (int64_t i = 0; i < lanes; ++i)
        if (some == L)
          at(to + i * x.rows + begin) = tile[i];
        else
          for (int64_t o = 0; o < some; ++o) to[i * x.rows + begin + o] = tile[i][o];
    }
  }
}

// The horizontal map goes where there are fewer rows.
template <class A>
void resample(const A* const* from, const Band<A>& y, const Band<A>& x, const Part<A>& part, A* scratch, A* to) {
  const int64_t rows_from = rows_read(y, part), rows_to = part.end - part.begin;
  A* const columns = scratch;
  A* const between = scratch + x.columns * kLanes<A>;
  const bool horizontal_first = rows_from < rows_to;
  const int64_t width = horizontal_first ? x.rows : x.columns, rows = horizontal_first ? rows_from : rows_to;
  const A** const row_of = new const A*[rows];
  for (int64_t i = 0; i < rows; ++i) row_of[i] = between + i * width;
  if (horizontal_first) {
    horizontal(from, rows, x, A(1), A(0), columns, between);
    vertical(row_of, y, part, width, to);
  } else {
    vertical(from, y, {part.begin, part.end, 1, 0}, width, between);
    horizontal(row_of, rows, x, part.scale, part.shift, columns, to);
  }
  delete[] row_of;
}

}  // namespace
}  // namespace vlmteacher::resize
