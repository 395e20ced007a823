// Resizing a plane on the CPU: Y X Z^T with two banded matrices. The definition is vlmteacher/ops/patchify.py.
//
// The vertical map adds up whole rows. The horizontal one first turns some rows into columns, so that it adds up
// vectors too: rows lie in the lanes. cpu.cpp, resize_avx2.cpp and resize_avx512.cpp include this and compile it for
// different processors (see vectors.h).
#pragma once

#include <utility>

#include "../vectors.h"

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
template <class A>
using Resample = void(const A* const* from, const Band<A>& y, const Band<A>& x, const Part<A>& part, A* scratch, A* to);

// For processors with these instructions (processor.h).
Resample<float>* resample_avx2();
Resample<float>* resample_avx512();

namespace {

template <class A>
constexpr int kRows = 64 / sizeof(A);  // that are turned into columns together
template <class A>
constexpr int kGroups = kRows<A> / kLanes<A>;

template <class A>
int64_t rows_read(const Band<A>& y, const Part<A>& part) {
  return y.start[part.end - 1] + y.taps - y.start[part.begin];
}

template <class A>
int64_t scratch_size(const Band<A>& y, const Band<A>& x, const Part<A>& part) {
  const int64_t from = rows_read(y, part), to = part.end - part.begin;
  return (from < to ? from * x.rows : to * x.columns) + x.columns * kRows<A>;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define INTERLEAVES
#endif
#endif

#ifdef INTERLEAVES
template <class V, int... I>
inline void interleave(const V& a, const V& b, V& low, V& high, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  low = __builtin_shufflevector(a, b, (I % 2 * lanes + I / 2)...);
  high = __builtin_shufflevector(a, b, (I % 2 * lanes + lanes / 2 + I / 2)...);
}
#endif

// A square, as many vectors as lanes, transposed: its halves dealt like cards, log2(lanes) times.
template <class A>
inline __attribute__((always_inline)) void transpose(Vector<A> (&v)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  Vector<A> dealt[lanes];
#ifdef INTERLEAVES
#pragma GCC unroll 4
  for (int step = 1; step < lanes; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i)
      interleave(v[i], v[i + lanes / 2], dealt[2 * i], dealt[2 * i + 1], std::make_integer_sequence<int, lanes>());
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = dealt[i];
  }
#else
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < lanes; ++j) dealt[i][j] = v[j][i];
  for (int i = 0; i < lanes; ++i) v[i] = dealt[i];
#endif
}
#undef INTERLEAVES

// to (width, kRows) from `count` rows, of which the last stands for those that are missing.
template <class A>
void columns_of(const A* const* rows, int64_t count, int64_t width, A* to) {
  constexpr int lanes = kLanes<A>;
  const A* from[kRows<A>];
  for (int64_t i = 0; i < kRows<A>; ++i) from[i] = rows[i < count ? i : count - 1];
  int64_t x = 0;
  for (; x + lanes <= width; x += lanes)
    for (int group = 0; group < kRows<A>; group += lanes) {
      Vector<A> v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) v[i] = at(from[group + i] + x);
      transpose<A>(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) at(to + (x + i) * kRows<A> + group) = v[i];
    }
  for (; x < width; ++x)
    for (int i = 0; i < kRows<A>; ++i) to[x * kRows<A> + i] = from[i][x];
}

template <class A>
void vertical(const A* const* from, const Band<A>& y, const Part<A>& part, int64_t width, A* to) {
  constexpr int lanes = kLanes<A>, vectors = 4;
  const A scale = part.scale, shift = part.shift;
  for (int64_t row = part.begin; row < part.end; ++row, to += width) {
    const A* const weight = y.weight + row * y.taps;
    const A* const* const rows = from + (y.start[row] - y.start[part.begin]);
    int64_t x = 0;
    for (; x + vectors * lanes <= width; x += vectors * lanes) {
      Vector<A> sum[vectors] = {};
      for (int64_t k = 0; k < y.taps; ++k)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) sum[i] += weight[k] * at(rows[k] + x + i * lanes);
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) at(to + x + i * lanes) = sum[i] * scale + shift;
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
  constexpr int lanes = kLanes<A>, groups = kGroups<A>;
  for (int64_t row = 0; row < count; row += kRows<A>, from += kRows<A>, to += kRows<A> * x.rows) {
    const int64_t rows = count - row < kRows<A> ? count - row : kRows<A>;
    columns_of(from, rows, x.columns, columns);
    for (int64_t begin = 0; begin < x.rows; begin += lanes) {
      const int64_t some = x.rows - begin < lanes ? x.rows - begin : lanes;
      Vector<A> tile[groups][lanes] = {};
      for (int64_t o = 0; o < some; ++o) {
        const A* const weight = x.weight + (begin + o) * x.taps;
        const A* const column = columns + x.start[begin + o] * kRows<A>;
        Vector<A> sum[groups] = {};
        for (int64_t k = 0; k < x.taps; ++k)
#pragma GCC unroll 4
          for (int i = 0; i < groups; ++i) sum[i] += weight[k] * at(column + k * kRows<A> + i * lanes);
#pragma GCC unroll 4
        for (int i = 0; i < groups; ++i) tile[i][o] = sum[i] * scale + shift;
      }
      for (int group = 0; group < groups; ++group) {
        transpose<A>(tile[group]);
        for (int64_t i = 0; i < lanes && group * lanes + i < rows; ++i) {
          A* const out = to + (group * lanes + i) * x.rows + begin;
          if (some == lanes)
            at(out) = tile[group][i];
          else
            for (int64_t o = 0; o < some; ++o) out[o] = tile[group][i][o];
        }
      }
    }
  }
}

// The horizontal map goes where there are fewer rows.
template <class A>
void resample(const A* const* from, const Band<A>& y, const Band<A>& x, const Part<A>& part, A* scratch, A* to) {
  const int64_t rows_from = rows_read(y, part), rows_to = part.end - part.begin;
  A* const columns = scratch;
  A* const between = scratch + x.columns * kRows<A>;
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
