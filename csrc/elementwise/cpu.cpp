// Element-wise operators on the CPU where the processor has AVX-512 BF16 (elsewhere they are torch's). The definitions
// are in vlmteacher/ops/elementwise.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "elementwise.h"

namespace {

namespace elementwise = vlmteacher::elementwise;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

bool half(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
char* bytes(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

// x (B, N, H, d), rows of any strides but contiguous elements; cos, sin (N, d / 2).
Tensor rotate(const Tensor& any_x, const Tensor& any_cos, const Tensor& any_sin, bool back) {
  const Tensor x = any_x.stride(3) == 1 ? any_x : torch::stable::contiguous(any_x);
  const Tensor cos = dense(any_cos), sin = dense(any_sin);
  const int64_t tokens = x.size(1), heads = x.size(2), width = x.size(3) / 2, size = x.element_size();
  Tensor out = torch::stable::new_empty(x, {x.size(0), tokens, heads, x.size(3)});
  const float *c = static_cast<const float*>(cos.const_data_ptr()),
              *s = static_cast<const float*>(sin.const_data_ptr());
  const char* from = bytes(x);
  char* to = bytes(out);
  const int64_t row = heads * 2 * width;
  torch::stable::parallel_for(0, x.size(0) * tokens, kGrain / row + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i % tokens;
      elementwise::rotate(half(x), back, heads, width, from + (i / tokens * x.stride(0) + token * x.stride(1)) * size,
                          x.stride(2) * size, c + token * width, s + token * width, to + i * row * size);
    }
  });
  return out;
}

Tensor gelu(const Tensor& any_x, std::optional<Tensor> any_grad) {
  const Tensor x = dense(any_x);
  const std::optional<Tensor> grad = any_grad ? std::optional(dense(*any_grad)) : std::nullopt;
  Tensor out = torch::stable::empty_like(x);
  const char *from = bytes(x), *slope = grad ? bytes(*grad) : nullptr;
  char* to = bytes(out);
  const int64_t size = x.element_size();
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size;
    elementwise::gelu(half(x), end - begin, from + at, slope ? slope + at : nullptr, to + at);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor");
  m.def("gelu(Tensor x, Tensor? grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("gelu", TORCH_BOX(&gelu));
}
