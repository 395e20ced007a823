// Attention on the CPU where the processor has AVX-512 (elsewhere it is torch's). The definition is
// vlmteacher/ops/attention.py.
#include <limits>

#include "../operator.h"
#include "../scratch.h"
#include "attention.h"

namespace {

using namespace vlmteacher;

// A tensor with contiguous heads, and tokens near enough for 32-bit offsets (pack_transposed); copied otherwise.
Tensor rows(const Tensor& t) {
  const bool near = t.stride(1) <= std::numeric_limits<int32_t>::max() / 16 / int64_t(t.element_size());
  return near && (t.stride(3) == 1 || t.size(3) == 1) ? t : torch::stable::contiguous(t);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& spans) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "attention takes (batch, tokens, heads, channels)");
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || (dtype == ScalarType::BFloat16 && q.size(3) % 2 == 0),
                  "attention takes float32, and bfloat16 with an even number of channels");
  STD_TORCH_CHECK(uses(Processor::kAvx512), "attention needs a processor, and a build, with AVX-512");
  expect("k", k, {q.size(0), kAny, kAny, q.size(3)}, dtype, q);
  expect_like("v", v, k);
  STD_TORCH_CHECK(k.size(1) > 0 && k.size(2) > 0 && q.size(2) % k.size(2) == 0, k.size(1), " keys, or ", k.size(2),
                  " key heads for ", q.size(2), " heads");
  if (!spans) return;
  expect("spans", *spans, {q.size(1), 3}, ScalarType::Int, q);
  STD_TORCH_CHECK(spans->is_contiguous(), "spans must be contiguous");
  const int32_t* bound = static_cast<const int32_t*>(spans->const_data_ptr());
  for (int64_t i = 0; i < 3 * q.size(1); ++i)
    STD_TORCH_CHECK(bound[i] >= 0 && bound[i] <= k.size(1), "spans must lie within the ", k.size(1), " keys");
}

attention::Heads heads(const Tensor& t) {
  const int64_t bytes = t.element_size();
  return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
}

attention::Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& spans, double scale) {
  attention::Problem p{};
  p.half = q.scalar_type() == ScalarType::BFloat16;
  p.batch = q.size(0);
  p.queries = q.size(1);
  p.heads = q.size(2);
  p.dim = q.size(3);
  p.keys = k.size(1);
  p.key_heads = k.size(2);
  p.scale = scale;
  p.spans = spans ? static_cast<const int32_t*>(spans->const_data_ptr()) : nullptr;
  p.q = heads(q);
  p.k = heads(k);
  p.v = heads(v);
  return p;
}

attention::Kernels kernels_for(const Tensor& q) {
  if (q.scalar_type() == ScalarType::Float) return attention::float32_avx512();
  if (uses(Processor::kAmxTiles)) return attention::bfloat16_amx();
  return uses(Processor::kAvx512Bf16) ? attention::bfloat16_avx512bf16() : attention::bfloat16_avx512();
}

void read(attention::Problem& p, const Tensor& softmax) {
  p.top = static_cast<float*>(softmax.mutable_data_ptr());
  p.inverse = p.top + p.batch * p.heads * p.queries;
}

Tensors forward(const Tensor& any_q, const Tensor& any_k, const Tensor& any_v, const Maybe& spans, double scale) {
  check(any_q, any_k, any_v, spans);
  const Tensor q = rows(any_q), k = rows(any_k), v = rows(any_v);
  attention::Problem p = problem(q, k, v, spans, scale);
  Tensor out = torch::stable::new_empty(q, {p.batch, p.queries, p.heads, p.dim});
  const Tensor softmax = torch::stable::new_empty(q, {2, p.batch, p.heads, p.queries}, ScalarType::Float);
  p.out = heads(out);
  read(p, softmax);
  const attention::Kernels kernels = kernels_for(q);
  const int64_t bytes = kernels.packed_bytes(p), blocks = (p.queries + kernels.block - 1) / kernels.block;
  const int64_t group = p.heads / p.key_heads;
  const Scratch packed(bytes * p.batch * p.key_heads);
  torch::stable::parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.pack(p, i / p.key_heads, i % p.key_heads, packed.data + i * bytes);
  });
  torch::stable::parallel_for(0, p.batch * p.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / blocks / p.heads, head = i / blocks % p.heads;
      kernels.forward(p, batch, head, i % blocks * kernels.block,
                      packed.data + (batch * p.key_heads + head / group) * bytes);
    }
  });
  return {out, softmax};
}

Tensors backward(const Tensor& any_grad, const Tensor& any_q, const Tensor& any_k, const Tensor& any_v,
                 const Tensor& any_out, const Tensor& any_softmax, const Maybe& spans, double scale) {
  check(any_q, any_k, any_v, spans);
  expect_like("the gradient", any_grad, any_q);
  expect_like("out", any_out, any_q);
  expect("softmax", any_softmax, {2, any_q.size(0), any_q.size(2), any_q.size(1)}, ScalarType::Float, any_q);
  const Tensor softmax = dense(any_softmax);
  const Tensor grad = rows(any_grad), q = rows(any_q), k = rows(any_k), v = rows(any_v), out = rows(any_out);
  attention::Problem p = problem(q, k, v, spans, scale);
  const Tensor dq = torch::stable::new_empty(q, {p.batch, p.queries, p.heads, p.dim});
  const Tensor dk = torch::stable::new_empty(q, {p.batch, p.keys, p.key_heads, p.dim});
  const Tensor dv = torch::stable::new_empty(q, {p.batch, p.keys, p.key_heads, p.dim});
  p.grad = heads(grad);
  p.out = heads(out);
  read(p, softmax);
  p.dq = heads(dq);
  p.dk = heads(dk);
  p.dv = heads(dv);
  const attention::Kernels kernels = kernels_for(q);
  torch::stable::parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.backward(p, i / p.key_heads, i % p.key_heads);
  });
  return {dq, dk, dv};
}

bool available() { return uses(Processor::kAvx512Bf16); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("avx512_bf16() -> bool");  // whether they are in use
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? spans, float scale) -> Tensor[]");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor? spans, "
      "float scale) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CompositeExplicitAutograd, m) { m.impl("avx512_bf16", boxed<&available>); }

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("attention", boxed<&forward>);
  m.impl("attention_backward", boxed<&backward>);
}
