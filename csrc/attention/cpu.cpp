// Attention on the CPU where the processor has AVX-512 BF16 (elsewhere it is torch's). The definition is
// vlmteacher/ops/attention.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "attention.h"

namespace {

namespace attention = vlmteacher::attention;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One whose heads have contiguous elements.
Tensor rows(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t); }

attention::Heads heads(const Tensor& t) {
  const int64_t bytes = t.element_size();
  return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
}

attention::Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& spans,
                           double scale) {
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

void read(attention::Problem& p, const Tensor& softmax) {
  p.top = static_cast<float*>(softmax.mutable_data_ptr());
  p.inverse = p.top + p.batch * p.heads * p.queries;
}

std::vector<Tensor> forward(const Tensor& any_q, const Tensor& any_k, const Tensor& any_v, std::optional<Tensor> spans,
                            double scale) {
  const Tensor q = rows(any_q), k = rows(any_k), v = rows(any_v);
  attention::Problem p = problem(q, k, v, spans, scale);
  Tensor out = torch::stable::new_empty(q, {p.batch, p.queries, p.heads, p.dim});
  const Tensor softmax = torch::stable::new_empty(q, {2, p.batch, p.heads, p.queries}, ScalarType::Float);
  p.out = heads(out);
  read(p, softmax);
  const int64_t bytes = attention::packed_bytes(p), blocks = (p.queries + attention::kBlock - 1) / attention::kBlock;
  const int64_t group = p.heads / p.key_heads;
  const std::unique_ptr<char, decltype(&std::free)> packed(
      static_cast<char*>(std::aligned_alloc(64, bytes * p.batch * p.key_heads + 64)), std::free);
  torch::stable::parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      attention::pack(p, i / p.key_heads, i % p.key_heads, packed.get() + i * bytes);
  });
  torch::stable::parallel_for(0, p.batch * p.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / blocks / p.heads, head = i / blocks % p.heads;
      attention::forward(p, batch, head, i % blocks * attention::kBlock,
                         packed.get() + (batch * p.key_heads + head / group) * bytes);
    }
  });
  return {out, softmax};
}

std::vector<Tensor> backward(const Tensor& any_grad, const Tensor& any_q, const Tensor& any_k, const Tensor& any_v,
                             const Tensor& any_out, const Tensor& softmax, std::optional<Tensor> spans, double scale) {
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
  torch::stable::parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attention::backward(p, i / p.key_heads, i % p.key_heads);
  });
  return {dq, dk, dv};
}

bool available() { return attention::available(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("avx512_bf16() -> bool");  // of this processor and this build
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? spans, float scale) -> Tensor[]");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, Tensor? spans, "
      "float scale) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CompositeExplicitAutograd, m) {
  m.impl("avx512_bf16", TORCH_BOX(&available));
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("attention", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}
