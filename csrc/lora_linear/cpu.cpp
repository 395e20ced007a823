// The fused LoRA linear on the CPU. The definition is
// vlmteacher/ops/lora_linear.py. The big products are the vendor's, which
// reaches AMX or AVX-512 by itself; those with the rank are our own where the
// processor has AVX-512 BF16.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "skinny.h"

namespace {

namespace skinny = vlmteacher::skinny;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor columns(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 1, first, count); }

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// out (m, n) = alpha left right + beta out; a 1-d `base` (the bias) takes the
// place of out on the right.
void vendor(Tensor& out, const Tensor& base, const Tensor& left, const Tensor& right, double alpha, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), base.get(), left.get(), right.get(), beta, alpha));
}

bool to_matrix(const Tensor& t, skinny::Matrix& found) {
  const bool rows = t.stride(1) == 1 || t.size(1) == 1, columns = t.stride(0) == 1 || t.size(0) == 1;
  found = {t.const_data_ptr(), rows ? t.stride(0) : t.stride(1), !rows};
  return rows || columns;
}

// The same where one of the sides is the rank.
void with_rank(Tensor& out, const Tensor& left, const Tensor& right, double alpha, bool accumulate) {
  static const bool available = skinny::available();
  const bool half = out.scalar_type() == ScalarType::BFloat16;
  const int64_t m = out.size(0), n = out.size(1), k = left.size(1);
  skinny::Matrix l, r;
  if (!available || !(half || out.scalar_type() == ScalarType::Float) || !to_matrix(left, l) || !to_matrix(right, r) ||
      out.stride(1) != 1 || (half && !skinny::takes_bfloat16(l, r, k)))
    return vendor(out, out, left, right, alpha, accumulate ? 1 : 0);
  const int64_t bytes = half ? 2 : 4, size = l.transposed ? n : m;
  torch::stable::parallel_for(0, size, 64, [&](int64_t begin, int64_t end) {
    skinny::Matrix some_l = l, some_r = r;
    int64_t offset;
    if (l.transposed) {  // few rows, many columns
      some_r.data = static_cast<const char*>(r.data) + begin * bytes * (r.transposed ? r.stride : 1);
      offset = begin;
    } else {
      some_l.data = static_cast<const char*>(l.data) + begin * bytes * l.stride;
      offset = begin * out.stride(0);
    }
    const int64_t rows = l.transposed ? m : end - begin, columns = l.transposed ? end - begin : n;
    skinny::product(half, rows, columns, k, static_cast<float>(alpha), some_l, some_r, accumulate,
                    static_cast<char*>(out.mutable_data_ptr()) + offset * bytes, out.stride(0));
  });
}

// The tensors on top of one another, (sum of rows, columns); one alone is
// itself.
Tensor stack(const std::vector<Tensor>& tensors) {
  if (tensors.size() == 1) return tensors[0];
  int64_t rows = 0, row = 0;
  for (const Tensor& t : tensors) rows += t.size(0);
  Tensor all = torch::stable::new_empty(tensors[0], {rows, tensors[0].size(1)});
  for (const Tensor& t : tensors) {
    Tensor part = torch::stable::narrow(all, 0, row, t.size(0));
    torch::stable::copy_(part, t);
    row += t.size(0);
  }
  return all;
}

std::vector<Tensor> lora_linear(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                std::vector<Tensor> lora_a, std::vector<Tensor> lora_b, std::vector<double> scaling) {
  const int64_t m = x.size(0);
  const Tensor a = stack(lora_a);
  Tensor s = torch::stable::new_empty(x, {m, a.size(0)});
  with_rank(s, x, transposed(a), 1, false);
  std::vector<Tensor> found;
  int64_t column = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rank = lora_b[i].size(1);
    Tensor y = torch::stable::new_empty(x, {m, weights[i].size(0)});
    vendor(y, biases.empty() ? y : biases[i], x, transposed(weights[i]), 1, biases.empty() ? 0 : 1);
    with_rank(y, columns(s, column, rank), transposed(lora_b[i]), scaling[i], true);
    found.push_back(y);
    column += rank;
  }
  found.push_back(s);
  return found;
}

std::vector<Tensor> lora_linear_backward(std::vector<Tensor> grads, const Tensor& x, const Tensor& s,
                                         std::vector<Tensor> weights, std::vector<Tensor> lora_a,
                                         std::vector<Tensor> lora_b, std::vector<double> scaling, bool need_x,
                                         bool need_a, bool need_b) {
  const size_t layers = weights.size();
  const int64_t m = grads[0].size(0);
  std::vector<Tensor> found;
  if (need_x || need_a) {
    const Tensor a = stack(lora_a);
    Tensor ds = torch::stable::new_empty(grads[0], {m, a.size(0)});
    int64_t column = 0;
    for (size_t i = 0; i < layers; ++i) {
      const int64_t rank = lora_b[i].size(1);
      Tensor part = columns(ds, column, rank);
      with_rank(part, grads[i], lora_b[i], scaling[i], false);
      column += rank;
    }
    if (need_x) {
      Tensor dx = torch::stable::new_empty(grads[0], {m, a.size(1)});
      for (size_t i = 0; i < layers; ++i) vendor(dx, dx, grads[i], weights[i], 1, i == 0 ? 0 : 1);
      with_rank(dx, ds, a, 1, true);
      found.push_back(dx);
    }
    if (need_a) {
      column = 0;
      for (const Tensor& each : lora_a) {
        Tensor da = torch::stable::new_empty(each, {each.size(0), each.size(1)});
        with_rank(da, transposed(columns(ds, column, each.size(0))), x, 1, false);
        found.push_back(da);
        column += each.size(0);
      }
    }
  }
  if (need_b) {
    int64_t column = 0;
    for (size_t i = 0; i < layers; ++i) {
      const int64_t n = lora_b[i].size(0), rank = lora_b[i].size(1);
      Tensor turned = torch::stable::new_empty(lora_b[i], {rank, n});
      with_rank(turned, transposed(columns(s, column, rank)), grads[i], scaling[i], false);
      found.push_back(torch::stable::contiguous(transposed(turned)));
      column += rank;
    }
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def(
      "lora_linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] "
      "lora_a, Tensor[] lora_b, float[] scaling) -> "
      "Tensor[]");
  m.def(
      "lora_linear_backward(Tensor[] grads, Tensor x, Tensor s, Tensor[] "
      "weights, Tensor[] lora_a, Tensor[] lora_b, "
      "float[] scaling, bool need_x, bool need_a, bool need_b) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}
