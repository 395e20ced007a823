// The fused LoRA linear on the CPU. The definition is vlmteacher/ops/lora_linear.py. The products are our own where the
// processor has AVX-512: those with the rank always, the big ones in bfloat16 where it has BF16 too. Else they are the
// vendor's. On AMX's tiles S and dS are small products of the wide kind, for its left operand is there already.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../scratch.h"
#include "check.h"
#include "skinny.h"
#include "wide.h"

namespace {

using namespace vlmteacher;

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

// `t`, contiguous, in `dtype`.
Tensor as(ScalarType dtype, const Tensor& t) {
  return t.scalar_type() == dtype ? dense(t) : dense(torch::stable::to(t, dtype));
}

// out (m, n) = alpha left right + beta out; a 1-d `base` (the bias) takes the place of out on the right. On processors
// without instructions for it the vendor's products of bfloat16 take several times those of float32: there it is
// widened before them.
void vendor(Tensor out, const Tensor& base, const Tensor& left, const Tensor& right, double alpha, double beta) {
  if (out.scalar_type() == ScalarType::BFloat16 && !uses(Processor::kAvx512Bf16)) {
    const auto widened = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
    const Tensor sum = torch::stable::new_empty(out, {out.size(0), out.size(1)}, ScalarType::Float);
    vendor(sum, beta == 0 ? sum : widened(base), widened(left), widened(right), alpha, beta);
    torch::stable::copy_(out, sum);
    return;
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), base.get(), left.get(), right.get(), beta, alpha));
}

// out = alpha left right + (accumulate ? out : 0) where one of the sides is the rank; all have contiguous rows. The
// gradient of a float32 factor may come from bfloat16 operands.
class WithRank {
 public:
  WithRank(const Operand& out, const Operand& left, const Operand& right, double alpha, bool accumulate)
      : out_(out), left_(left), right_(right), alpha_(alpha), accumulate_(accumulate) {
    const ScalarType dtype = left.of.scalar_type();
    half_ = dtype == ScalarType::BFloat16, wide_ = out.of.scalar_type() == ScalarType::Float;
    m_ = out.rows(), n_ = out.columns(), k_ = left.columns();
    l_ = {left.data(), left.of.stride(0), left.turned}, r_ = {right.data(), right.of.stride(0), right.turned};
    to_ = out.data(), stride_ = out.of.stride(0);
    // A handful of float32 sums (one row of x) is no work to save: theirs then round as the plain expression's do.
    own_ = half_ ? uses(Processor::kAvx512) && skinny::takes_bfloat16(l_, r_, k_)
                 : uses(Processor::kAvx512) && dtype == ScalarType::Float && m_ * n_ >= 256;
  }

  bool own() const { return own_; }
  bool by_rows() const { return m_ >= n_; }  // the longer side is divided
  int64_t extent() const { return by_rows() ? m_ : n_; }

  // Rows [begin, end) of out, or columns. Only where `own`.
  void part(bool by_rows, int64_t begin, int64_t end) const {
    skinny::Matrix l = l_, r = r_;
    skinny::Matrix& some = by_rows ? l : r;
    const bool strided = by_rows != some.transposed;  // elements of that side stand a row apart
    some.data = static_cast<const char*>(some.data) + begin * (half_ ? 2 : 4) * (strided ? some.stride : 1);
    const auto product = !half_                         ? skinny::product_float32
                         : uses(Processor::kAvx512Bf16) ? skinny::product_bfloat16_avx512bf16
                                                        : skinny::product_bfloat16_avx512;
    product(by_rows ? end - begin : m_, by_rows ? n_ : end - begin, k_, static_cast<float>(alpha_), l, r, accumulate_,
            to_ + begin * (wide_ ? 4 : 2) * (by_rows ? stride_ : 1), stride_, wide_);
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

constexpr int64_t kGrain = 64;  // least number of rows or columns per thread

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
  if (products.empty()) return;
  for (const WithRank& product : products)
    if (!product.own()) {
      for (const WithRank& each : products) at_once({each});
      return;
    }
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (const WithRank& product : products) product.part(true, begin, end);
  });
}

// Whether a big product of `rows` rows is ours, whose operands have as many columns. Few rows do not repay the
// packing of the weight.
bool takes(ScalarType dtype, int64_t rows, const std::vector<int64_t>& columns) {
  const bool even = std::all_of(columns.begin(), columns.end(), [](int64_t count) { return count % 2 == 0; });
  const bool own = uses(Processor::kAvx512Bf16) && processor() != Processor::kAmx;
  return own && even && dtype == ScalarType::BFloat16 && rows >= 4;
}

// out = the sum of all left right, plus the bias where there is one. All have contiguous rows.
struct Wide {
  Tensors alive;
  std::vector<wide::Segment> segments;
  wide::Product product;

  Wide(const Operand& out, const Tensor* bias)
      : product{nullptr, 0, out.rows(), out.columns(), nullptr, out.data(), out.of.stride(0)} {
    if (bias) product.bias = alive.emplace_back(dense(*bias)).const_data_ptr();
  }
  void add(const Operand& left, const Operand& right) {
    segments.push_back({left.data(), left.of.stride(0), right.data(), right.of.stride(0), right.turned, left.count});
    alive.push_back(left.of), alive.push_back(right.of);
  }
  int64_t panels() const { return (product.n + wide::kColumns - 1) / wide::kColumns; }
};

// The left operands of wide products as AMX reads them: one copy of each, whatever the number of its products.
class Copies {
 public:
  // The products read copies from here on; theirs are made where there are none.
  void serve(std::vector<Wide>& products) {
    const int64_t m = products[0].product.m;
    const size_t before = copies_.size();
    for (Wide& each : products)
      for (const wide::Segment& s : each.segments)
        if (!find(s)) copies_.push_back({s, {allocate(wide::copied_bytes(m, s.k)), std::free}});
    if (before < copies_.size())
      torch::stable::parallel_for(
          0, (m + wide::kCopiedRows - 1) / wide::kCopiedRows, 1, [&](int64_t begin, int64_t end) {
            const int64_t row = begin * wide::kCopiedRows, rows = std::min(end * wide::kCopiedRows, m) - row;
            for (size_t i = before; i < copies_.size(); ++i) {
              const wide::Segment& from = copies_[i].from;
              wide::copy_rows_amx(from.left, from.left_stride, from.k, row, rows, copies_[i].data.get());
            }
          });
    for (Wide& each : products)
      for (wide::Segment& s : each.segments) s.left = find(s);
  }

 private:
  struct Copy {
    wide::Segment from;
    std::unique_ptr<void, decltype(&std::free)> data;
  };
  std::vector<Copy> copies_;

  const void* find(const wide::Segment& s) const {
    for (const Copy& copy : copies_)
      if (copy.from.left == s.left && copy.from.k == s.k) return copy.data.get();
    return nullptr;
  }
};

// Products that do not read one another's results. A thread takes some panels when it is done with the ones before.
void in_panels(std::vector<Wide>& products, Copies& copies) {
  const bool tiles = uses(Processor::kAmxTiles);
  if (tiles) copies.serve(products);
  int64_t panels = 0;
  for (Wide& each : products) {
    panels += each.panels();
    each.product.segments = each.segments.data(), each.product.count = int64_t(each.segments.size());
  }
  const int64_t threads = torch::stable::get_num_threads(), m = products[0].product.m;
  // On tiles the left operands come from afar for every group.
  const int64_t group = std::clamp<int64_t>(panels / ((tiles ? 2 : 8) * threads), 1, 8);
  const int64_t blocks = std::clamp<int64_t>((2 * threads + panels - 1) / panels, 1, std::max<int64_t>(m / 96, 1));
  const int64_t rows = ((m + blocks - 1) / blocks + wide::kCopiedRows - 1) / wide::kCopiedRows * wide::kCopiedRows;
  struct Task {
    const wide::Product* product;
    int64_t row, rows, panel;
  };
  std::vector<Task> tasks;
  for (const Wide& each : products)
    for (int64_t row = 0; row < m; row += rows)
      for (int64_t panel = 0; panel < each.panels(); panel += group)
        tasks.push_back({&each.product, row, std::min(rows, m - row), panel});
  const auto part = tiles ? wide::part_amx : wide::part_avx512bf16;
  std::atomic<size_t> next = 0;
  torch::stable::parallel_for(0, std::min<int64_t>(threads, tasks.size()), 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++)
      part(*tasks[i].product, tasks[i].row, tasks[i].rows, tasks[i].panel, group);
  });
}

// The tensors on top of one another, (sum of rows, columns), times a factor, in x's dtype; one alone of that dtype is
// itself.
Tensor stack(const Tensor& x, const Tensors& tensors, double factor = 1) {
  const ScalarType dtype = x.scalar_type();
  if (tensors.size() == 1 && tensors[0].scalar_type() == dtype && factor == 1) return dense(tensors[0]);
  int64_t rows = 0;
  for (const Tensor& t : tensors) rows += t.size(0);
  Tensor all = empty(x, rows, tensors[0].size(1));
  char* to = static_cast<char*>(all.mutable_data_ptr());
  const auto round = uses(Processor::kAvx512Bf16) ? skinny::round_avx512bf16 : skinny::round_avx512;
  for (const Tensor& t : tensors) {
    const int64_t count = t.numel();
    if (uses(Processor::kAvx512) && dtype == ScalarType::BFloat16 &&
        (factor != 1 || t.scalar_type() == ScalarType::Float))
      round(static_cast<const float*>(as(ScalarType::Float, t).const_data_ptr()), count, float(factor), to);
    else
      std::memcpy(to, as(dtype, t).const_data_ptr(), count * all.element_size());
    to += count * all.element_size();
  }
  return all;
}

Tensors forward(const Tensor& any_x, Tensors weights, Tensors biases, Tensors lora_a, Tensors lora_b,
                std::vector<double> scaling) {
  check_lora_linear(any_x, weights, biases, lora_a, lora_b, scaling, true);
  const Tensor x = dense(any_x), a = stack(x, lora_a);
  const int64_t m = x.size(0);
  const Tensor s = empty(x, m, a.size(0));
  std::vector<int64_t> columns{x.size(1)};
  for (const Tensor& b : lora_b) columns.push_back(b.size(1));
  const bool own = takes(x.scalar_type(), m, columns);
  const bool tiles = own && uses(Processor::kAmxTiles);  // which take the product with the rank too
  std::vector<WithRank> products;
  std::vector<Wide> small, big;
  if (tiles) {
    small.emplace_back(s, nullptr);
    small.back().add(x, Operand(a).transpose());
  } else {
    products.push_back({s, x, Operand(a).transpose(), 1, false});
  }
  Tensors found;
  int64_t column = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rank = lora_b[i].size(1);
    const Tensor b = stack(x, {lora_b[i]}, own ? scaling[i] : 1), y = empty(x, m, weights[i].size(0));
    if (own) {
      big.emplace_back(y, biases.empty() ? nullptr : &biases[i]);
      big.back().add(x, Operand(dense(weights[i])).transpose());
      big.back().add({s, column, rank}, Operand(b).transpose());
    } else {
      vendor(y, biases.empty() ? y : biases[i], x, transposed(weights[i]), 1, biases.empty() ? 0 : 1);
      products.push_back({y, {s, column, rank}, Operand(b).transpose(), scaling[i], true});
    }
    found.push_back(y);
    column += rank;
  }
  Copies copies;
  if (tiles) in_panels(small, copies);
  in_turn(m, products);
  if (own) in_panels(big, copies);
  found.push_back(s);
  return found;
}

Tensors backward(Tensors grads, const Tensor& any_x, const Tensor& any_s, Tensors weights, Tensors lora_a,
                 Tensors lora_b, std::vector<double> scaling, bool need_x, bool need_a, bool need_b) {
  check_lora_linear_backward(grads, any_x, any_s, weights, lora_a, lora_b, scaling, need_a, need_b, true);
  const size_t layers = weights.size();
  const int64_t m = grads[0].size(0);
  for (Tensor& grad : grads) grad = dense(grad);
  Tensors found;
  std::vector<WithRank> factors;  // the gradients of A and B, after all else
  if (need_x || need_a) {
    const Tensor a = stack(grads[0], lora_a);
    const Tensor ds = empty(grads[0], m, a.size(0));
    std::vector<int64_t> columns{a.size(0)};
    for (const Tensor& grad : grads) columns.push_back(grad.size(1));
    const bool own = need_x && takes(ds.scalar_type(), m, columns), tiles = own && uses(Processor::kAmxTiles);
    std::vector<WithRank> products;
    std::vector<Wide> small, big;
    int64_t column = 0;
    for (size_t i = 0; i < layers; ++i) {
      const Tensor b = stack(grads[0], {lora_b[i]}, tiles ? scaling[i] : 1);
      const Operand some(ds, column, b.size(1));
      if (tiles) {
        small.emplace_back(some, nullptr);
        small.back().add(grads[i], b);
      } else {
        products.push_back({some, grads[i], b, scaling[i], false});
      }
      column += b.size(1);
    }
    if (need_x) {
      const Tensor dx = empty(grads[0], m, a.size(1));
      if (own) {
        big.emplace_back(dx, nullptr);
        for (size_t i = 0; i < layers; ++i) big.back().add(grads[i], dense(weights[i]));
        big.back().add(ds, a);
      } else {
        for (size_t i = 0; i < layers; ++i) vendor(dx, dx, grads[i], weights[i], 1, i == 0 ? 0 : 1);
        products.push_back({dx, ds, a, 1, true});
      }
      found.push_back(dx);
    }
    Copies copies;
    if (tiles) in_panels(small, copies);
    in_turn(m, products);
    if (own) in_panels(big, copies);
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
  m.impl("lora_linear", boxed<&forward>);
  m.impl("lora_linear_backward", boxed<&backward>);
}
