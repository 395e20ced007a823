// The LoRA linear on NVIDIA GPUs: torch's tensors for plan.cuh.
#include "../cuda_device.h"
#include "check.h"
#include "plan.cuh"

namespace {

using namespace vlmteacher;

// What the kernels may assume: contiguous rows.
void prepare(std::initializer_list<Tensors*> groups, size_t layers) {
  STD_TORCH_CHECK(layers < lora_linear::MostProducts, "lora_linear: too many layers in a group: ", layers);
  for (Tensors* group : groups)
    for (Tensor& t : *group) t = torch::stable::contiguous(t);
}

Tensors lora_linear_forward(const Tensor& x_any, Tensors weights, Tensors biases, Tensors lora_a, Tensors lora_b,
                            std::vector<double> scaling) {
  check_lora_linear(x_any, weights, biases, lora_a, lora_b, scaling, false);
  const Tensor x = torch::stable::contiguous(x_any);
  prepare({&weights, &biases, &lora_a, &lora_b}, weights.size());
  Tensors found;
  int64_t ranks = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    found.push_back(torch::stable::new_empty(x, {x.size(0), weights[i].size(0)}));
    ranks += lora_a[i].size(0);
  }
  found.push_back(torch::stable::new_empty(x, {x.size(0), ranks}));
  with_type(x.scalar_type(), [&]<class T>() {
    std::vector<lora_linear::Layer<T>> layers;
    for (size_t i = 0; i < weights.size(); ++i)
      layers.push_back({.weight = data<T>(weights[i]),
                        .bias = biases.empty() ? nullptr : data<T>(biases[i]),
                        .lora_a = data<T>(lora_a[i]),
                        .lora_b = data<T>(lora_b[i]),
                        .y = data<T>(found[i]),
                        .n = size(weights[i], 0),
                        .rank = size(lora_a[i], 0),
                        .scaling = static_cast<float>(scaling[i])});
    Device device(x);
    lora_linear::forward(device, data<T>(x), size(x, 0), size(x, 1), layers, data<T>(found.back()));
  });
  return found;
}

Tensors lora_linear_backward(Tensors grads, const Tensor& x_any, const Tensor& s_any, Tensors weights, Tensors lora_a,
                             Tensors lora_b, std::vector<double> scaling, bool need_x, bool need_a, bool need_b) {
  check_lora_linear_backward(grads, x_any, s_any, weights, lora_a, lora_b, scaling, need_a, need_b, false);
  const Tensor x = torch::stable::contiguous(x_any), s = torch::stable::contiguous(s_any);
  prepare({&grads, &weights, &lora_a, &lora_b}, weights.size());
  Tensors found;
  const auto add_like = [&](const Tensor& t) {
    found.push_back(torch::stable::new_empty(t, t.sizes()));
    return found.back();
  };
  Tensors dx, da, db;
  if (need_x) dx.push_back(add_like(x));
  if (need_a)
    for (const Tensor& a : lora_a) da.push_back(add_like(a));
  if (need_b)
    for (const Tensor& b : lora_b) db.push_back(add_like(b));
  with_type(x.scalar_type(), [&]<class T>() {
    std::vector<lora_linear::Layer<T>> layers;
    for (size_t i = 0; i < weights.size(); ++i)
      layers.push_back({.weight = data<T>(weights[i]),
                        .lora_a = data<T>(lora_a[i]),
                        .lora_b = data<T>(lora_b[i]),
                        .grad = data<T>(grads[i]),
                        .da = need_a ? data<T>(da[i]) : nullptr,
                        .db = need_b ? data<T>(db[i]) : nullptr,
                        .n = size(weights[i], 0),
                        .rank = size(lora_a[i], 0),
                        .scaling = static_cast<float>(scaling[i])});
    Device device(x);
    lora_linear::backward(device, data<T>(x), data<T>(s), size(x, 0), size(x, 1), layers,
                          need_x ? data<T>(dx[0]) : nullptr, need_a, need_b);
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cuda, m) {
  m.def(
      "lora_linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_a, Tensor[] lora_b, float[] scaling) -> "
      "Tensor[]");
  m.def(
      "lora_linear_backward(Tensor[] grads, Tensor x, Tensor s, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, "
      "float[] scaling, bool need_x, bool need_a, bool need_b) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cuda, CUDA, m) {
  m.impl("lora_linear", boxed<&lora_linear_forward>);
  m.impl("lora_linear_backward", boxed<&lora_linear_backward>);
}
