// RMSNorm and rotary position embedding on the CPU. The definition is vlmteacher/ops/qk_norm_rope.py; arithmetic is in
// float (double for double), rounded once.
#include "../cpu_rows.h"
#include "../processor.h"
#include "check.h"
#include "rows.h"

namespace {

using namespace vlmteacher;

template <class T>
qk_norm_rope::Rows<T>* best_rows() {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>) {
    if (uses(Processor::kAvx512)) return qk_norm_rope::rows_avx512<T>();
    if (uses(Processor::kAvx2)) return qk_norm_rope::rows_avx2<T>();
  }
  return qk_norm_rope::rows<T>;
}

// Forward if `grads` is empty.
Tensors run(const Tensors& grads, const Tensors& xs, const Tensors& weights, const Maybe& any_cos, const Maybe& any_sin,
            int64_t heads, double eps) {
  check_qk_norm_rope(grads, xs, weights, any_cos, any_sin, heads);
  const Maybe cos = dense(any_cos), sin = dense(any_sin);
  Tensors found;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor x = dense(xs[i]), weight = dense(weights[i]);
    Maybe grad;
    if (!grads.empty()) grad = dense(grads[i]);
    Tensor out = torch::stable::empty_like(x);
    const int64_t width = x.size(2), channels = width / heads;
    with_type(x.scalar_type(), [&]<class T>() {
      using A = Accumulate<T>;
      const qk_norm_rope::Work<T> work{x.size(1),
                                       width,
                                       channels,
                                       static_cast<A>(eps),
                                       data<const T>(x),
                                       data<const T>(weight),
                                       data<const T>(grad),
                                       data<const A>(cos),
                                       data<const A>(sin),
                                       data<T>(out)};
      const auto rows = best_rows<T>();
      each_row(x.size(0) * x.size(1), width, [&](int64_t begin, int64_t end) {
        std::vector<A> scratch(qk_norm_rope::scratch_size(width, channels));
        rows(work, begin, end, scratch.data());
      });
    });
    found.push_back(out);
  }
  return found;
}

Tensors forward(Tensors xs, Tensors weights, const Maybe& cos, const Maybe& sin, int64_t heads, double eps) {
  return run({}, xs, weights, cos, sin, heads, eps);
}

Tensors backward(Tensors grads, Tensors xs, Tensors weights, const Maybe& cos, const Maybe& sin, int64_t heads,
                 double eps) {
  STD_TORCH_CHECK(grads.size() == xs.size(), "qk_norm_rope takes as many gradients as tensors");
  return run(grads, xs, weights, cos, sin, heads, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cpp, m) {
  m.def("qk_norm_rope(Tensor[] xs, Tensor[] weights, Tensor? cos, Tensor? sin, int heads, float eps) -> Tensor[]");
  m.def(
      "qk_norm_rope_backward(Tensor[] grads, Tensor[] xs, Tensor[] weights, Tensor? cos, Tensor? sin, int heads, "
      "float eps) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cpp, CPU, m) {
  m.impl("qk_norm_rope", boxed<&forward>);
  m.impl("qk_norm_rope_backward", boxed<&backward>);
}
