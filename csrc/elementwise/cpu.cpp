// Element-wise operators on the CPU where the processor has AVX-512 (elsewhere they are torch's). The definitions
// are in vlmteacher/ops/elementwise.py.
#include "../operator.h"
#include "elementwise.h"

namespace {

using namespace vlmteacher;

constexpr int64_t kGrain = 1 << 14;  // least number of elements per thread

bool half(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }
char* bytes(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

void check(const Tensor& x) {
  STD_TORCH_CHECK(half(x) || x.scalar_type() == ScalarType::Float, "this operator takes float32 and bfloat16");
  STD_TORCH_CHECK(uses(Processor::kAvx512), "this operator needs a processor, and a build, with AVX-512");
}

// x (B, N, H, d), rows of any strides but contiguous elements; cos, sin (N, 1, d / 2).
Tensor rotate(const Tensor& any_x, const Tensor& any_cos, const Tensor& any_sin, bool back) {
  check(any_x);
  STD_TORCH_CHECK(any_x.dim() == 4 && any_x.size(3) % 2 == 0, "rotate takes (batch, tokens, heads, even channels)");
  for (const Tensor* table : {&any_cos, &any_sin})
    expect("cos and sin", *table, {any_x.size(1), 1, any_x.size(3) / 2}, ScalarType::Float, any_x);
  const Tensor x = any_x.stride(3) == 1 ? any_x : torch::stable::contiguous(any_x);
  const Tensor cos = dense(any_cos), sin = dense(any_sin);
  const int64_t tokens = x.size(1), heads = x.size(2), width = x.size(3) / 2, size = x.element_size();
  Tensor out = torch::stable::new_empty(x, {x.size(0), tokens, heads, x.size(3)});
  const float *c = static_cast<const float*>(cos.const_data_ptr()),
              *s = static_cast<const float*>(sin.const_data_ptr());
  const char* from = bytes(x);
  char* to = bytes(out);
  const int64_t row = heads * 2 * width;
  const auto rotated = !half(x)                       ? elementwise::rotate_float32
                       : uses(Processor::kAvx512Bf16) ? elementwise::rotate_bfloat16_avx512bf16
                                                      : elementwise::rotate_bfloat16_avx512;
  torch::stable::parallel_for(0, x.size(0) * tokens, kGrain / (row + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i % tokens;
      rotated(back, heads, width, from + (i / tokens * x.stride(0) + token * x.stride(1)) * size, x.stride(2) * size,
              c + token * width, s + token * width, to + i * row * size);
    }
  });
  return out;
}

Tensor gelu(const Tensor& any_x, const Maybe& any_grad) {
  check(any_x);
  expect_like("the gradient", any_grad, any_x);
  const Tensor x = dense(any_x);
  const Maybe grad = dense(any_grad);
  Tensor out = torch::stable::empty_like(x);
  const char *from = bytes(x), *slope = grad ? bytes(*grad) : nullptr;
  char* to = bytes(out);
  const int64_t size = x.element_size();
  const auto computed = !half(x)                       ? elementwise::gelu_float32
                        : uses(Processor::kAvx512Bf16) ? elementwise::gelu_bfloat16_avx512bf16
                                                       : elementwise::gelu_bfloat16_avx512;
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size;
    computed(end - begin, from + at, slope ? slope + at : nullptr, to + at);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor");
  m.def("gelu(Tensor x, Tensor? grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("rotate", boxed<&rotate>);
  m.impl("gelu", boxed<&gelu>);
}
