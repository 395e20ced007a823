// One token at a time: a row is summed, centred and written while it is in the first-level cache. cpu.cpp,
// rows_avx2.cpp and rows_avx512.cpp include this (see vectors.h). The definition is vlmteacher/ops/ada_norm.py.
#pragma once

#include "../vectors.h"

namespace vlmteacher::ada_norm {

struct Sizes {
  int64_t tokens, width;         // of an item of the batch: its first `first` tokens take row 0 of a table, the
  int64_t first, batches, rows;  // others the last; a table (batches, rows, width) of one batch is for all items

  int64_t row(int64_t token) const {  // where the token's begins in a table
    const int64_t item = batches == 1 ? 0 : token / tokens;
    return (item * rows + (token % tokens < first ? 0 : rows - 1)) * width;
  }
};

template <class T>
struct Forward {  // out = x + y gate, norm = LN(out) weight + bias; null pointers: absent
  using A = Accumulate<T>;
  Sizes sizes;
  A eps;
  const T *x, *y;
  const A *gate, *weight, *bias;
  T *out, *norm;
};

template <class T>
struct Backward {  // dx = grad_out + LN'(grad_norm), dy = dx gate; null pointers: absent
  using A = Accumulate<T>;
  Sizes sizes;
  A eps;
  const T *grad_out, *grad_norm, *kept;  // kept: the norm's input
  const A *gate, *weight;
  T *dx, *dy;
};

// Tokens [begin, end) of all items.
template <class T>
struct Rows {
  void (*forward)(const Forward<T>&, int64_t begin, int64_t end);
  void (*backward)(const Backward<T>&, int64_t begin, int64_t end);
};

// For processors with these instructions (processor.h).
template <class T>
Rows<T> rows_avx2();
template <class T>
Rows<T> rows_avx512();

namespace {

template <class A>
struct Moments {
  A mean, scale;  // scale: 1 / standard deviation
};

template <class T, class A>
Moments<A> moments(const T* row, int64_t width, A eps) {
  Vector<A> total = {}, squares = {};
  runs<A>(width, RUN(&) { total += load(row + i, count); });
  const A mean = sum<A>(total) / width;
  runs<A>(
      width, RUN(&) {
        Vector<A> v = load(row + i, count) - mean;
        for (int64_t rest = count; rest < kLanes<A>; ++rest) v[rest] = 0;
        squares += v * v;
      });
  return {mean, 1 / static_cast<A>(sizeof(A) == 8 ? __builtin_sqrt(sum<A>(squares) / width + eps)
                                                  : __builtin_sqrtf(sum<A>(squares) / width + eps))};
}

template <class T>
void forward(const Forward<T>& f, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t width = f.sizes.width;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t start = token * width, row = f.sizes.row(token);
    const T* x = f.x + start;
    if (f.y) {
      const T* const y = f.y + start;
      T* const out = f.out + start;
      if (f.gate)
        runs<A>(
            width, RUN(&, gate = f.gate + row) {
              store(out + i, count, load(x + i, count) + load(y + i, count) * load(gate + i, count));
            });
      else
        runs<A>(width, RUN(&) { store(out + i, count, load(x + i, count) + load(y + i, count)); });
      x = out;
    }
    if (!f.weight) continue;
    const auto [mean, scale] = moments(x, width, f.eps);
    T* const norm = f.norm + start;
    runs<A>(
        width, RUN(&, weight = f.weight + row, bias = f.bias + row) {
          const Vector<A> v = (load(x + i, count) - mean) * scale;
          store(norm + i, count, v * load(weight + i, count) + load(bias + i, count));
        });
  }
}

template <class T>
void backward(const Backward<T>& f, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t width = f.sizes.width;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t start = token * width, row = f.sizes.row(token);
    const auto from = [start](const T* all) { return all ? all + start : all; };
    const T *const kept = from(f.kept), *const grad_norm = from(f.grad_norm), *const grad_out = from(f.grad_out);
    A mean = 0, scale = 0, along = 0, average = 0;
    if (f.weight) {
      const Moments<A> found = moments(kept, width, f.eps);
      mean = found.mean, scale = found.scale;
      Vector<A> grads = {}, products = {};
      runs<A>(
          width, RUN(&, weight = f.weight + row) {
            const Vector<A> grad = load(grad_norm + i, count) * load(weight + i, count);
            grads += grad;
            products += grad * (load(kept + i, count) - mean);
          });
      average = sum<A>(grads) / width, along = sum<A>(products) * scale * scale / width;
    }
    const auto write = [&](int64_t i, int64_t count, Vector<A> grad) __attribute__((always_inline)) {
      if (f.dx) store(f.dx + start + i, count, grad);
      if (f.dy) store(f.dy + start + i, count, grad * load(f.gate + row + i, count));
    };
    const auto through_norm = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      const Vector<A> grad = load(grad_norm + i, count) * load(f.weight + row + i, count);
      return (grad - average - (load(kept + i, count) - mean) * along) * scale;
    };
    if (!f.weight)
      runs<A>(width, RUN(&) { write(i, count, load(grad_out + i, count)); });
    else if (!f.grad_out)
      runs<A>(width, RUN(&) { write(i, count, through_norm(i, count)); });
    else
      runs<A>(width, RUN(&) { write(i, count, load(grad_out + i, count) + through_norm(i, count)); });
  }
}

}  // namespace
}  // namespace vlmteacher::ada_norm
