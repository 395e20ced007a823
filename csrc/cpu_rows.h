// What row-by-row operators need from torch on the CPU.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "operator.h"
#include "vectors.h"

namespace vlmteacher {

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
T* data(const Maybe& t) {
  return t ? data<T>(*t) : nullptr;
}

// f with the element type that vectors.h loads.
template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Half:
      return f.template operator()<torch::headeronly::Half>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    default:
      STD_TORCH_CHECK(false, "float64, float32, float16 and bfloat16 are taken");
  }
}

// f(begin, end) over all rows, by as many threads as there is work for.
template <class F>
void each_row(int64_t rows, int64_t width, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)), f);
}

}  // namespace vlmteacher
