// Residual, LayerNorm and modulation on NVIDIA GPUs: torch's tensors for plan.cuh.
#include "../cuda_device.h"
#include "check.h"
#include "plan.cuh"

namespace {

using namespace vlmteacher;

ada_norm::Sizes sizes_of(const Tensor& x, const Maybe& gate, const Maybe& weight, int64_t first) {
  const Tensor* table = gate ? &*gate : weight ? &*weight : nullptr;
  return {size(x, 1), size(x, 2), static_cast<int>(first), table ? size(*table, 0) : 1, table ? size(*table, 1) : 1};
}

Tensors forward(const Tensor& any_x, const Maybe& any_y, const Maybe& any_gate, const Maybe& any_weight,
                const Maybe& any_bias, int64_t first, double eps) {
  check_ada_norm(any_x, any_y, any_gate, any_weight, any_bias, first);
  const Tensor x = aligned(any_x);
  const Maybe y = aligned(any_y), gate = aligned(any_gate), weight = aligned(any_weight), bias = aligned(any_bias);
  Tensors found;
  Maybe out, norm;
  if (y) found.push_back(*(out = torch::stable::new_empty(x, x.sizes())));
  if (weight) found.push_back(*(norm = torch::stable::new_empty(x, x.sizes())));
  with_type(x.scalar_type(), [&]<class T>() {
    Device device(x);
    ada_norm::run(
        device,
        ada_norm::Forward<T>{sizes_of(x, gate, weight, first), static_cast<float>(eps), data<T>(x), data<T>(y),
                             data<float>(gate), data<float>(weight), data<float>(bias), data<T>(out), data<T>(norm)},
        rows(x));
  });
  return found;
}

Tensors backward(const Maybe& any_grad_out, const Maybe& any_grad_norm, const Maybe& any_kept, const Maybe& any_gate,
                 const Maybe& any_weight, int64_t first, double eps, bool need_x, bool need_y) {
  check_ada_norm_backward(any_grad_out, any_grad_norm, any_kept, any_gate, any_weight, first, need_y);
  const Maybe grad_out = aligned(any_grad_out), grad_norm = aligned(any_grad_norm), kept = aligned(any_kept);
  const Maybe gate = aligned(any_gate), weight = aligned(any_weight);
  const Tensor& like = grad_out ? *grad_out : *grad_norm;
  Tensors found;
  Maybe dx, dy;
  if (need_x) found.push_back(*(dx = torch::stable::new_empty(like, like.sizes())));
  if (need_y) found.push_back(*(dy = torch::stable::new_empty(like, like.sizes())));
  with_type(like.scalar_type(), [&]<class T>() {
    Device device(like);
    ada_norm::run(device,
                  ada_norm::Backward<T>{sizes_of(like, gate, weight, first), static_cast<float>(eps), data<T>(grad_out),
                                        data<T>(grad_norm), data<T>(kept), data<float>(gate), data<float>(weight),
                                        data<T>(dx), data<T>(dy)},
                  rows(like));
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cuda, m) {
  m.def("ada_norm(Tensor x, Tensor? y, Tensor? gate, Tensor? weight, Tensor? bias, int first, float eps) -> Tensor[]");
  m.def(
      "ada_norm_backward(Tensor? grad_out, Tensor? grad_norm, Tensor? kept, Tensor? gate, Tensor? weight, int first, "
      "float eps, bool need_x, bool need_y) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cuda, CUDA, m) {
  m.impl("ada_norm", boxed<&forward>);
  m.impl("ada_norm_backward", boxed<&backward>);
}
