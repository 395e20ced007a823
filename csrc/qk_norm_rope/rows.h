// One token at a time: RMSNorm over the whole row, then the rotation of each head's pairs of channels by the token's
// angles, while the row is in the first-level cache. cpu.cpp, rows_avx2.cpp and rows_avx512.cpp include this (see
// vectors.h). The definition is vlmteacher/ops/qk_norm_rope.py.
#pragma once

#include "../vectors.h"

namespace vlmteacher::qk_norm_rope {

template <class T>
struct Work {
  using A = Accumulate<T>;
  int64_t tokens, width, channels;  // of an item of the batch; an even number of channels to a head
  A eps;
  const T *x, *weight, *grad;  // grad: null forward
  const A *cos, *sin;          // (tokens, channels / 2), or null: no rotation
  T* out;                      // y, or dx
};

// Tokens [begin, end) of all items; `scratch` has scratch_size(width, channels) elements.
template <class T>
using Rows = void(const Work<T>&, int64_t begin, int64_t end, Accumulate<T>* scratch);

inline int64_t scratch_size(int64_t width, int64_t channels) { return width + 2 * channels; }

// For processors with these instructions (processor.h).
template <class T>
Rows<T>* rows_avx2();
template <class T>
Rows<T>* rows_avx512();

namespace {

// Each even lane and the one behind it, exchanged.
inline Vector<float> swapped(const Vector<float>& v) {
  typedef uint64_t Pairs __attribute__((vector_size(kVectorBytes)));
  const Pairs bits = (Pairs)v;
  return (Vector<float>)(bits << 32 | bits >> 32);
}
inline Vector<double> swapped(const Vector<double>& v) {
  Vector<double> other;
  for (int i = 0; i < kLanes<double>; ++i) other[i] = v[i ^ 1];
  return other;
}

// One row of cosines, twice each, and one of sines, of which the first of each pair is negative: then a rotation is
// v * cosines + swapped(v) * sines, and the rotation back has the sines subtracted.
template <class A>
void spread(const A* cos, const A* sin, int64_t pairs, A* cosines, A* sines) {
  for (int64_t i = 0; i < pairs; ++i) {
    cosines[2 * i] = cosines[2 * i + 1] = cos[i];
    sines[2 * i] = -sin[i], sines[2 * i + 1] = sin[i];
  }
}

template <class T>
void rows(const Work<T>& w, int64_t begin, int64_t end, Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const int64_t width = w.width, channels = w.cos ? w.channels : w.width;
  A *const between = scratch, *const cosines = scratch + width, *const sines = cosines + w.channels;
  for (int64_t token = begin; token < end; ++token) {
    const T* const x = w.x + token * width;
    T* const out = w.out + token * width;
    if (w.cos) {
      const int64_t pairs = w.channels / 2, at = token % w.tokens * pairs;
      spread(w.cos + at, w.sin + at, pairs, cosines, sines);
    }
    Vector<A> squares = {};
    runs<A>(
        width, RUN(&) {
          const Vector<A> v = load(x + i, count);
          squares += v * v;
        });
    const A square = sum<A>(squares) / width + w.eps;
    const A scale = 1 / static_cast<A>(sizeof(A) == 8 ? __builtin_sqrt(square) : __builtin_sqrtf(square));
    if (!w.grad) {
      for (int64_t head = 0; head < width; head += channels)
        runs<A>(
            channels, RUN(&) {
              Vector<A> v = load(x + head + i, count) * scale * load(w.weight + head + i, count);
              if (w.cos) v = v * load(cosines + i, count) + swapped(v) * load(sines + i, count);
              store(out + head + i, count, v);
            });
      continue;
    }
    const T* const grad = w.grad + token * width;
    Vector<A> products = {};
    for (int64_t head = 0; head < width; head += channels)
      runs<A>(
          channels, RUN(&) {
            Vector<A> g = load(grad + head + i, count);
            if (w.cos) g = g * load(cosines + i, count) - swapped(g) * load(sines + i, count);
            g *= load(w.weight + head + i, count);
            products += g * load(x + head + i, count);
            store(between + head + i, count, g);
          });
    const A along = sum<A>(products) * scale * scale / width;
    runs<A>(width, RUN(&) { store(out + i, count, (load(between + i, count) - load(x + i, count) * along) * scale); });
  }
}

}  // namespace
}  // namespace vlmteacher::qk_norm_rope
