// Residual, LayerNorm and modulation on the CPU. The definition is vlmteacher/ops/ada_norm.py; arithmetic is in float
// (double for double), rounded once.
#include "../cpu_rows.h"
#include "../processor.h"
#include "check.h"
#include "rows.h"

namespace {

using namespace vlmteacher;

template <class T>
ada_norm::Rows<T> best_rows() {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>) {
    if (uses(Processor::kAvx512)) return ada_norm::rows_avx512<T>();
    if (uses(Processor::kAvx2)) return ada_norm::rows_avx2<T>();
  }
  return {ada_norm::forward, ada_norm::backward};
}

ada_norm::Sizes sizes_of(const Tensor& x, const Maybe& gate, const Maybe& weight, int64_t first) {
  const Tensor* table = gate ? &*gate : weight ? &*weight : nullptr;
  return {x.size(1), x.size(2), first, table ? table->size(0) : 1, table ? table->size(1) : 1};
}

Tensors forward(const Tensor& any_x, const Maybe& any_y, const Maybe& any_gate, const Maybe& any_weight,
                const Maybe& any_bias, int64_t first, double eps) {
  check_ada_norm(any_x, any_y, any_gate, any_weight, any_bias, first);
  const Tensor x = dense(any_x);
  const Maybe y = dense(any_y), gate = dense(any_gate), weight = dense(any_weight), bias = dense(any_bias);
  Tensors found;
  Tensor out = x, norm = x;
  if (y) found.push_back(out = torch::stable::empty_like(x));
  if (weight) found.push_back(norm = torch::stable::empty_like(x));
  with_type(x.scalar_type(), [&]<class T>() {
    using A = Accumulate<T>;
    const ada_norm::Forward<T> work{sizes_of(x, gate, weight, first),
                                    static_cast<A>(eps),
                                    data<const T>(x),
                                    data<const T>(y),
                                    data<const A>(gate),
                                    data<const A>(weight),
                                    data<const A>(bias),
                                    data<T>(out),
                                    data<T>(norm)};
    const auto rows = best_rows<T>().forward;
    each_row(x.size(0) * x.size(1), x.size(2), [&](int64_t begin, int64_t end) { rows(work, begin, end); });
  });
  return found;
}

Tensors backward(const Maybe& any_grad_out, const Maybe& any_grad_norm, const Maybe& any_kept, const Maybe& any_gate,
                 const Maybe& any_weight, int64_t first, double eps, bool need_x, bool need_y) {
  check_ada_norm_backward(any_grad_out, any_grad_norm, any_kept, any_gate, any_weight, first, need_y);
  const Maybe grad_out = dense(any_grad_out), grad_norm = dense(any_grad_norm), kept = dense(any_kept);
  const Maybe gate = dense(any_gate), weight = dense(any_weight);
  const Tensor& like = grad_out ? *grad_out : *grad_norm;
  Tensors found;
  Maybe dx, dy;
  if (need_x) found.push_back(*(dx = torch::stable::empty_like(like)));
  if (need_y) found.push_back(*(dy = torch::stable::empty_like(like)));
  with_type(like.scalar_type(), [&]<class T>() {
    using A = Accumulate<T>;
    const ada_norm::Backward<T> work{sizes_of(like, gate, weight, first),
                                     static_cast<A>(eps),
                                     data<const T>(grad_out),
                                     data<const T>(grad_norm),
                                     data<const T>(kept),
                                     data<const A>(gate),
                                     data<const A>(weight),
                                     data<T>(dx),
                                     data<T>(dy)};
    const auto rows = best_rows<T>().backward;
    each_row(like.size(0) * like.size(1), like.size(2), [&](int64_t begin, int64_t end) { rows(work, begin, end); });
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("ada_norm(Tensor x, Tensor? y, Tensor? gate, Tensor? weight, Tensor? bias, int first, float eps) -> Tensor[]");
  m.def(
      "ada_norm_backward(Tensor? grad_out, Tensor? grad_norm, Tensor? kept, Tensor? gate, Tensor? weight, int first, "
      "float eps, bool need_x, bool need_y) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("ada_norm", boxed<&forward>);
  m.impl("ada_norm_backward", boxed<&backward>);
}
