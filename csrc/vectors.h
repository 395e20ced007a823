// Vectors as wide as the including file's flags allow, and elements of tensors through them, with arithmetic in float
// (double of double). A file and its variants for other processors (*_avx2.cpp, *_avx512.cpp) include this: hence the
// unnamed namespace, and no library code, which the linker could share between them.
#pragma once

#include <cstdint>

namespace vlmteacher {

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulateOf {
  using Type = float;
};
template <>
struct AccumulateOf<double> {
  using Type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::Type;

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Vectors {
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
  typedef A Anywhere __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
};
template <class A>
using Vector = typename Vectors<A>::Vector;
template <class A>
using Anywhere = typename Vectors<A>::Anywhere;  // of any alignment

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <class A>
inline const Anywhere<A>& at(const A* from) {
  return *reinterpret_cast<const Anywhere<A>*>(from);
}

template <class A>
inline Anywhere<A>& at(A* to) {
  return *reinterpret_cast<Anywhere<A>*>(to);
}

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// kLanes elements.
inline Vector<float> load(const float* from) { return at(from); }
inline Vector<double> load(const double* from) { return at(from); }
inline Vector<float> load(const BFloat16* from) {
  return (Vector<float>)(__builtin_convertvector(*reinterpret_cast<const HalfWords*>(from), Words) << 16);
}
template <class T>
inline Vector<float> load(const T* from) {
  Vector<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(from[i]);
  return v;
}

inline void store(float* to, const Vector<float>& v) { at(to) = v; }
inline void store(double* to, const Vector<double>& v) { at(to) = v; }
inline void store(BFloat16* to, const Vector<float>& v) {  // to nearest, ties to even
  const Words bits = (Words)v, nan = Words{} + 0x7fc0;
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *reinterpret_cast<HalfWords*>(to) = __builtin_convertvector(v == v ? rounded : nan, HalfWords);
}
template <class T>
inline void store(T* to, const Vector<float>& v) {
  for (int i = 0; i < kLanes<float>; ++i) to[i] = static_cast<T>(v[i]);
}

// The first `count` elements, zeros in the other lanes.
template <class T>
inline Vector<Accumulate<T>> load(const T* from, int64_t count) {
  constexpr int lanes = kLanes<Accumulate<T>>;
  if (count == lanes) return load(from);
  T some[lanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load(some);
}

template <class T>
inline void store(T* to, int64_t count, const Vector<Accumulate<T>>& v) {
  constexpr int lanes = kLanes<Accumulate<T>>;
  if (count == lanes) return store(to, v);
  T some[lanes];
  store(some, v);
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

template <class A>
inline A sum(const Vector<A>& v) {
  A total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += v[i];
  return total;
}

// f(i, count) for every run of `count` elements from i on, of which all but the last have kLanes<A>.
template <class A, class F>
inline __attribute__((always_inline)) void runs(int64_t size, const F& f) {
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) f(i, int64_t{lanes});
  if (i < size) f(i, size - i);
}
#define RUN(...) [__VA_ARGS__](int64_t i, int64_t count) __attribute__((always_inline))

}  // namespace
}  // namespace vlmteacher
