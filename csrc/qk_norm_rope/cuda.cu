// RMSNorm and rotary position embedding on NVIDIA GPUs: torch's tensors for plan.cuh.
#include "../cuda_device.h"
#include "check.h"
#include "plan.cuh"

namespace {

using namespace vlmteacher;

// Forward if `grads` is empty.
Tensors run(const Tensors& grads, const Tensors& xs, const Tensors& weights, const Maybe& any_cos, const Maybe& any_sin,
            int64_t heads, double eps) {
  check_qk_norm_rope(grads, xs, weights, any_cos, any_sin, heads);
  const Maybe cos = aligned(any_cos), sin = aligned(any_sin);
  Tensors found;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor x = aligned(xs[i]), weight = aligned(weights[i]);
    const Maybe grad = grads.empty() ? Maybe() : aligned(Maybe(grads[i]));
    found.push_back(torch::stable::new_empty(x, x.sizes()));
    with_type(x.scalar_type(), [&]<class T>() {
      Device device(x);
      qk_norm_rope::run(device,
                        qk_norm_rope::Work<T>{size(x, 1), size(x, 2), static_cast<int>(x.size(2) / heads / 2),
                                              static_cast<float>(eps), data<T>(x), data<T>(weight), data<T>(grad),
                                              data<float>(cos), data<float>(sin), data<T>(found.back())},
                        rows(x));
    });
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

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cuda, m) {
  m.def("qk_norm_rope(Tensor[] xs, Tensor[] weights, Tensor? cos, Tensor? sin, int heads, float eps) -> Tensor[]");
  m.def(
      "qk_norm_rope_backward(Tensor[] grads, Tensor[] xs, Tensor[] weights, Tensor? cos, Tensor? sin, int heads, "
      "float eps) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cuda, CUDA, m) {
  m.impl("qk_norm_rope", boxed<&forward>);
  m.impl("qk_norm_rope_backward", boxed<&backward>);
}
