// What every operator needs from torch, on any device: its entry point, which keeps error messages, and checks of
// arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// weak: torch has it from 2.13 on
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace vlmteacher {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

// `function` for torch's dispatcher, as TORCH_BOX. An error from behind torch's C interface keeps its message, by which
// optimization/memory_ladder.py recognises that memory is full.
template <auto function>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  try {
    TORCH_BOX(function)(stack, inputs, outputs);
  } catch (const std::exception& error) {
    if (!torch_exception_get_what_without_backtrace || !std::strstr(error.what(), " API call failed at ")) throw;
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
}

constexpr int64_t kAny = -1;  // matches any size

inline std::string described(ScalarType dtype, const int64_t* sizes, size_t dim) {
  std::ostringstream text;
  text << torch::headeronly::toString(dtype) << " (";
  for (size_t i = 0; i < dim; ++i) {
    text << (i ? ", " : "");
    sizes[i] == kAny ? text << "any" : text << sizes[i];
  }
  text << ")";
  return text.str();
}

inline void expect(const char* name, const Tensor& t, const int64_t* sizes, size_t dim, ScalarType dtype,
                   const Tensor& x) {
  const auto found = t.sizes();
  bool fits = found.size() == dim && t.scalar_type() == dtype;
  for (size_t i = 0; fits && i < dim; ++i) fits = sizes[i] == kAny || found[i] == sizes[i];
  STD_TORCH_CHECK(fits, name, " must be ", described(dtype, sizes, dim), ", not ",
                  described(t.scalar_type(), found.data(), found.size()));
  STD_TORCH_CHECK(t.get_device() == x.get_device(), name, " is not on the device of the other tensors");
}

// Throws unless `t` has these sizes and this dtype, on x's device.
inline void expect(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype,
                   const Tensor& x) {
  expect(name, t, sizes.begin(), sizes.size(), dtype, x);
}
inline void expect(const char* name, const Maybe& t, std::initializer_list<int64_t> sizes, ScalarType dtype,
                   const Tensor& x) {
  if (t) expect(name, *t, sizes, dtype, x);
}

// Throws unless `t` is like x.
inline void expect_like(const char* name, const Tensor& t, const Tensor& x) {
  const auto sizes = x.sizes();
  expect(name, t, sizes.data(), sizes.size(), x.scalar_type(), x);
}
inline void expect_like(const char* name, const Maybe& t, const Tensor& x) {
  if (t) expect_like(name, *t, x);
}

// The dtype that an operator computes in.
inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Maybe dense(const Maybe& t) { return t ? Maybe(dense(*t)) : t; }

}  // namespace vlmteacher
