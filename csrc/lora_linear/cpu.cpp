// The fused LoRA linear on the CPU. The definition is vlmteacher/ops/lora_linear.py. The big products are the vendor's,
// which reaches AMX or AVX-512 by itself; those with the rank are our own where the processor has AVX-512 BF16.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <vector>

#include "skinny.h"

namespace {

namespace skinny = vlmteacher::skinny;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// Columns [first, first + count) of a matrix, or their transpose. Every view that torch makes costs microseconds, which
// the products with the rank do not take at small sizes: a tensor of it is made for the vendor only.
struct Operand {
  Tensor of;
  int64_t first, count;
  bool turned = false;

  Operand(const Tensor& t) : of(t), first(0), count(t.size(1)) {}
  Operand(const Tensor& t, int64_t first, int64_t count) : of(t), first(first), count(count) {}

  Operand transpose() const {
    Operand other = *this;
    other.turned = !turned;
    return other;
  }
  int64_t rows() const { return turned ? count : of.size(0); }
  int64_t columns() const { return turned ? of.size(0) : count; }
  char* data() const { return static_cast<char*>(of.mutable_data_ptr()) + first * of.element_size(); }

  Tensor tensor() const {
    Tensor whole = of;
    const Tensor part = count == of.size(1) ? of : torch::stable::narrow(whole, 1, first, count);
    return turned ? transposed(part) : part;
  }
};

// out (m, n) = alpha left right + beta out; a 1-d `base` (the bias) takes the place of out on the right.
void vendor(Tensor out, const Tensor& base, const Tensor& left, const Tensor& right, double alpha, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), base.get(), left.get(), right.get(), beta, alpha));
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// `t`, contiguous, in `dtype`.
Tensor as(ScalarType dtype, const Tensor& t) {
  return t.scalar_type() == dtype ? dense(t) : dense(torch::stable::to(t, dtype));
}

// out = alpha left right + (accumulate ? out : 0) where one of the sides is the rank; all have contiguous rows. The
// gradient of a float32 factor may come from bfloat16 operands.
void with_rank(const Operand& out, const Operand& left, const Operand& right, double alpha, bool accumulate) {
  static const bool available = skinny::available();
  const ScalarType dtype = left.of.scalar_type();
  const bool half = dtype == ScalarType::BFloat16, wide = out.of.scalar_type() == ScalarType::Float;
  const int64_t m = out.rows(), n = out.columns(), k = left.columns();
  const skinny::Matrix l{left.data(), left.of.stride(0), left.turned},
      r{right.data(), right.of.stride(0), right.turned};
  // A handful of float32 sums (one row of x) is no work to save: theirs then round as the plain expression's do.
  const bool own = half ? skinny::takes_bfloat16(l, r, k) : dtype == ScalarType::Float && m * n >= 256;
  if (!available || !own) {
    const Tensor to = out.tensor();
    if (dtype == to.scalar_type()) return vendor(to, to, left.tensor(), right.tensor(), alpha, accumulate ? 1 : 0);
    const Tensor narrow = torch::stable::new_empty(to, {m, n}, dtype);
    vendor(narrow, narrow, left.tensor(), right.tensor(), alpha, 0);
    Tensor whole = to;
    torch::stable::copy_(whole, narrow);
    return;
  }
  const int64_t bytes = half ? 2 : 4, out_bytes = wide ? 4 : 2, stride = out.of.stride(0);
  const bool by_rows = m >= n;  // the work is divided along the longer side
  torch::stable::parallel_for(0, by_rows ? m : n, 64, [&](int64_t begin, int64_t end) {
    skinny::Matrix some_l = l, some_r = r;
    skinny::Matrix& some = by_rows ? some_l : some_r;
    const bool strided = by_rows != some.transposed;  // elements of that side stand a row apart
    some.data = static_cast<const char*>(some.data) + begin * bytes * (strided ? some.stride : 1);
    skinny::product(half, by_rows ? end - begin : m, by_rows ? n : end - begin, k, static_cast<float>(alpha), some_l,
                    some_r, accumulate, out.data() + begin * out_bytes * (by_rows ? stride : 1), stride, wide);
  });
}

// The tensors on top of one another, (sum of rows, columns), in x's dtype; one alone of that dtype is itself.
Tensor stack(const Tensor& x, const std::vector<Tensor>& tensors) {
  const ScalarType dtype = x.scalar_type();
  if (tensors.size() == 1 && tensors[0].scalar_type() == dtype) return dense(tensors[0]);
  static const bool available = skinny::available();
  int64_t rows = 0;
  for (const Tensor& t : tensors) rows += t.size(0);
  Tensor all = torch::stable::new_empty(x, {rows, tensors[0].size(1)});
  char* to = static_cast<char*>(all.mutable_data_ptr());
  for (const Tensor& t : tensors) {
    const int64_t count = t.numel();
    if (available && dtype == ScalarType::BFloat16 && t.scalar_type() == ScalarType::Float && t.is_contiguous())
      skinny::round(static_cast<const float*>(t.const_data_ptr()), count, to);
    else
      std::memcpy(to, as(dtype, t).const_data_ptr(), count * all.element_size());
    to += count * all.element_size();
  }
  return all;
}

std::vector<Tensor> lora_linear(const Tensor& any_x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                std::vector<Tensor> lora_a, std::vector<Tensor> lora_b, std::vector<double> scaling) {
  const Tensor x = dense(any_x), a = stack(x, lora_a);
  const int64_t m = x.size(0);
  Tensor s = torch::stable::new_empty(x, {m, a.size(0)});
  with_rank(s, x, Operand(a).transpose(), 1, false);
  std::vector<Tensor> found;
  int64_t column = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor b = stack(x, {lora_b[i]});
    Tensor y = torch::stable::new_empty(x, {m, weights[i].size(0)});
    vendor(y, biases.empty() ? y : biases[i], x, transposed(weights[i]), 1, biases.empty() ? 0 : 1);
    with_rank(y, {s, column, b.size(1)}, Operand(b).transpose(), scaling[i], true);
    found.push_back(y);
    column += b.size(1);
  }
  found.push_back(s);
  return found;
}

std::vector<Tensor> lora_linear_backward(std::vector<Tensor> grads, const Tensor& any_x, const Tensor& any_s,
                                         std::vector<Tensor> weights, std::vector<Tensor> lora_a,
                                         std::vector<Tensor> lora_b, std::vector<double> scaling, bool need_x,
                                         bool need_a, bool need_b) {
  const size_t layers = weights.size();
  const int64_t m = grads[0].size(0);
  for (Tensor& grad : grads) grad = dense(grad);
  std::vector<Tensor> found;
  if (need_x || need_a) {
    const Tensor a = stack(grads[0], lora_a);
    Tensor ds = torch::stable::new_empty(grads[0], {m, a.size(0)});
    int64_t column = 0;
    for (size_t i = 0; i < layers; ++i) {
      const Tensor b = stack(grads[0], {lora_b[i]});
      with_rank({ds, column, b.size(1)}, grads[i], b, scaling[i], false);
      column += b.size(1);
    }
    if (need_x) {
      Tensor dx = torch::stable::new_empty(grads[0], {m, a.size(1)});
      for (size_t i = 0; i < layers; ++i) vendor(dx, dx, grads[i], weights[i], 1, i == 0 ? 0 : 1);
      with_rank(dx, ds, a, 1, true);
      found.push_back(dx);
    }
    if (need_a) {
      const Tensor x = dense(any_x);
      column = 0;
      for (const Tensor& each : lora_a) {
        Tensor da = torch::stable::new_empty(each, {each.size(0), each.size(1)});
        with_rank(da, Operand(ds, column, each.size(0)).transpose(), x, 1, false);
        found.push_back(da);
        column += each.size(0);
      }
    }
  }
  if (need_b) {
    const Tensor s = dense(any_s);
    int64_t column = 0;
    for (size_t i = 0; i < layers; ++i) {
      const int64_t n = lora_b[i].size(0), rank = lora_b[i].size(1);
      Tensor db = torch::stable::new_empty(lora_b[i], {n, rank});
      with_rank(db, Operand(grads[i]).transpose(), {s, column, rank}, scaling[i], false);
      found.push_back(db);
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
