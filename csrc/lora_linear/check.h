// Checks of the operator's arguments, shared by its backends; the definition is vlmteacher/ops/lora_linear.py.
#pragma once

#include "../operator.h"

namespace vlmteacher {

// like: of the rows' dtype; the depth K is that of the weights. float_factors: factors may be float32 beside bfloat16.
inline void check_layers(const Tensor& like, const Tensors& weights, const Tensors& lora_a, const Tensors& lora_b,
                         const std::vector<double>& scaling, bool float_factors) {
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers && lora_a.size() == layers && lora_b.size() == layers && scaling.size() == layers,
                  "lora_linear takes as many lora_a, lora_b and scaling as weights");
  STD_TORCH_CHECK(like.dim() == 2 && weights[0].dim() == 2, "lora_linear takes matrices");
  const ScalarType dtype = like.scalar_type();
  const auto of = [&](const Tensor& factor) {
    const bool other = float_factors && dtype == ScalarType::BFloat16 && factor.scalar_type() == ScalarType::Float;
    return other ? ScalarType::Float : dtype;
  };
  for (size_t i = 0; i < layers; ++i) {
    STD_TORCH_CHECK(lora_a[i].dim() == 2 && lora_a[i].size(0) > 0, "lora_a must be a matrix of one row or more");
    expect("a weight", weights[i], {kAny, weights[0].size(1)}, dtype, like);
    expect("lora_a", lora_a[i], {kAny, weights[0].size(1)}, of(lora_a[i]), like);
    expect("lora_b", lora_b[i], {weights[i].size(0), lora_a[i].size(0)}, of(lora_b[i]), like);
  }
}

inline void check_lora_linear(const Tensor& x, const Tensors& weights, const Tensors& biases, const Tensors& lora_a,
                              const Tensors& lora_b, const std::vector<double>& scaling, bool float_factors) {
  check_layers(x, weights, lora_a, lora_b, scaling, float_factors);
  expect("x", x, {kAny, weights[0].size(1)}, x.scalar_type(), x);
  STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), "lora_linear takes as many biases as weights");
  for (size_t i = 0; i < biases.size(); ++i) expect("a bias", biases[i], {weights[i].size(0)}, x.scalar_type(), x);
}

// x and s are checked only if they are needed.
inline void check_lora_linear_backward(const Tensors& grads, const Tensor& x, const Tensor& s, const Tensors& weights,
                                       const Tensors& lora_a, const Tensors& lora_b, const std::vector<double>& scaling,
                                       bool need_a, bool need_b, bool float_factors) {
  STD_TORCH_CHECK(!grads.empty() && grads.size() == weights.size(), "lora_linear takes as many gradients as weights");
  const Tensor& like = grads[0];
  check_layers(like, weights, lora_a, lora_b, scaling, float_factors);
  const ScalarType dtype = like.scalar_type();
  int64_t ranks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    expect("a gradient", grads[i], {like.size(0), weights[i].size(0)}, dtype, like);
    ranks += lora_a[i].size(0);
  }
  if (need_a) expect("x", x, {like.size(0), weights[0].size(1)}, dtype, like);
  if (need_b) expect("s", s, {like.size(0), ranks}, dtype, like);
}

}  // namespace vlmteacher
