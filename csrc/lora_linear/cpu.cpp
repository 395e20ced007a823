// The fused LoRA linear on the CPU. The definition is vlmteacher/ops/lora_linear.py. The big products are the vendor's,
// which reaches AMX or AVX-512 by itself; those with the rank are our own where the processor has AVX-512 BF16.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "skinny.h"

namespace {

namespace skinny = vlmteacher::skinny;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// (rows, columns), contiguous, of t's dtype. This and `transposed` ask torch directly: through its dispatcher, by name,
// a small layer's handful of them takes as long as its products with the rank.
Tensor empty(const Tensor& t, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1};
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  AtenTensorHandle found;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &found));
  return Tensor(found);
}

Tensor transposed(const Tensor& t) {
  const int64_t sizes[] = {t.size(1), t.size(0)}, strides[] = {t.stride(1), t.stride(0)};
  AtenTensorHandle found;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &found));  // 0: from t's own
  return Tensor(found);
}

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
class WithRank {
 public:
  WithRank(const Operand& out, const Operand& left, const Operand& right, double alpha, bool accumulate)
      : out_(out), left_(left), right_(right), alpha_(alpha), accumulate_(accumulate) {
    static const bool available = skinny::available();
    const ScalarType dtype = left.of.scalar_type();
    half_ = dtype == ScalarType::BFloat16, wide_ = out.of.scalar_type() == ScalarType::Float;
    m_ = out.rows(), n_ = out.columns(), k_ = left.columns();
    l_ = {left.data(), left.of.stride(0), left.turned}, r_ = {right.data(), right.of.stride(0), right.turned};
    to_ = out.data(), stride_ = out.of.stride(0);
    // A handful of float32 sums (one row of x) is no work to save: theirs then round as the plain expression's do.
    own_ = available && (half_ ? skinny::takes_bfloat16(l_, r_, k_) : dtype == ScalarType::Float && m_ * n_ >= 256);
  }

  bool own() const { return own_; }
  bool by_rows() const { return m_ >= n_; }  // the longer side is the one to divide
  int64_t extent() const { return by_rows() ? m_ : n_; }

  // Rows [begin, end) of out, or columns. Only where `own`.
  void part(bool by_rows, int64_t begin, int64_t end) const {
    skinny::Matrix l = l_, r = r_;
    skinny::Matrix& some = by_rows ? l : r;
    const bool strided = by_rows != some.transposed;  // elements of that side stand a row apart
    some.data = static_cast<const char*>(some.data) + begin * (half_ ? 2 : 4) * (strided ? some.stride : 1);
    skinny::product(half_, by_rows ? end - begin : m_, by_rows ? n_ : end - begin, k_, static_cast<float>(alpha_), l, r,
                    accumulate_, to_ + begin * (wide_ ? 4 : 2) * (by_rows ? stride_ : 1), stride_, wide_);
  }

  void by_vendor() const {
    const Tensor to = out_.tensor();
    const ScalarType dtype = left_.of.scalar_type();
    if (dtype == to.scalar_type()) return vendor(to, to, left_.tensor(), right_.tensor(), alpha_, accumulate_ ? 1 : 0);
    const Tensor narrow = torch::stable::new_empty(to, {m_, n_}, dtype);
    vendor(narrow, narrow, left_.tensor(), right_.tensor(), alpha_, 0);
    Tensor whole = to;
    torch::stable::copy_(whole, narrow);
  }

 private:
  Operand out_, left_, right_;
  double alpha_;
  bool accumulate_, half_, wide_, own_;
  int64_t m_, n_, k_, stride_;
  skinny::Matrix l_, r_;
  char* to_;
};

constexpr int64_t kGrain = 64;  // rows or columns that are worth a thread

// Products that do not read one another's results, in one parallel region: at small sizes a region costs as much as
// they do.
void at_once(const std::vector<WithRank>& products) {
  std::vector<const WithRank*> own;
  int64_t parts = 0;
  for (const WithRank& product : products)
    if (product.own())
      own.push_back(&product), parts += (product.extent() + kGrain - 1) / kGrain;
    else
      product.by_vendor();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (const WithRank* product : own) {  // its parts are [0, count) of what is left of the range
      const int64_t count = (product->extent() + kGrain - 1) / kGrain;
      if (begin < count && end > 0)
        product->part(product->by_rows(), std::max<int64_t>(begin, 0) * kGrain,
                      std::min(std::min(end, count) * kGrain, product->extent()));
      begin -= count, end -= count;
    }
  });
}

// Products that read, row by row, what those before them wrote: in one region too, divided along the rows they share.
void in_turn(int64_t rows, const std::vector<WithRank>& products) {
  for (const WithRank& product : products)
    if (!product.own()) {
      for (const WithRank& each : products) at_once({each});
      return;
    }
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (const WithRank& product : products) product.part(true, begin, end);
  });
}

// The tensors on top of one another, (sum of rows, columns), in x's dtype; one alone of that dtype is itself.
Tensor stack(const Tensor& x, const std::vector<Tensor>& tensors) {
  const ScalarType dtype = x.scalar_type();
  if (tensors.size() == 1 && tensors[0].scalar_type() == dtype) return dense(tensors[0]);
  static const bool available = skinny::available();
  int64_t rows = 0;
  for (const Tensor& t : tensors) rows += t.size(0);
  Tensor all = empty(x, rows, tensors[0].size(1));
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
  const Tensor s = empty(x, m, a.size(0));
  std::vector<WithRank> products{{s, x, Operand(a).transpose(), 1, false}};
  std::vector<Tensor> found;
  int64_t column = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor b = stack(x, {lora_b[i]});
    const Tensor y = empty(x, m, weights[i].size(0));
    vendor(y, biases.empty() ? y : biases[i], x, transposed(weights[i]), 1, biases.empty() ? 0 : 1);
    products.push_back({y, {s, column, b.size(1)}, Operand(b).transpose(), scaling[i], true});
    found.push_back(y);
    column += b.size(1);
  }
  in_turn(m, products);
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
  std::vector<WithRank> factors;  // the gradients of A and B, after all else
  if (need_x || need_a) {
    const Tensor a = stack(grads[0], lora_a);
    const Tensor ds = empty(grads[0], m, a.size(0));
    std::vector<WithRank> products;
    int64_t column = 0;
    for (size_t i = 0; i < layers; ++i) {
      const Tensor b = stack(grads[0], {lora_b[i]});
      products.push_back({{ds, column, b.size(1)}, grads[i], b, scaling[i], false});
      column += b.size(1);
    }
    if (need_x) {
      const Tensor dx = empty(grads[0], m, a.size(1));
      for (size_t i = 0; i < layers; ++i) vendor(dx, dx, grads[i], weights[i], 1, i == 0 ? 0 : 1);
      products.push_back({dx, ds, a, 1, true});
      found.push_back(dx);
    }
    in_turn(m, products);
    if (need_a) {
      const Tensor x = dense(any_x);
      column = 0;
      for (const Tensor& each : lora_a) {
        const Tensor da = empty(each, each.size(0), each.size(1));
        factors.push_back({da, Operand(ds, column, each.size(0)).transpose(), x, 1, false});
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
      const Tensor db = empty(lora_b[i], n, rank);
      factors.push_back({db, Operand(grads[i]).transpose(), {s, column, rank}, scaling[i], false});
      found.push_back(db);
      column += rank;
    }
  }
  at_once(factors);
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
