// Checks of the operator's arguments, shared by its backends; the definition is vlmteacher/ops/qk_norm_rope.py.
#pragma once

#include "../operator.h"

namespace vlmteacher {

inline void check_qk_norm_rope(const Tensors& grads, const Tensors& xs, const Tensors& weights, const Maybe& cos,
                               const Maybe& sin, int64_t heads) {
  STD_TORCH_CHECK(xs.size() == weights.size() && (grads.empty() || grads.size() == xs.size()),
                  "qk_norm_rope takes as many weights, and gradients, as tensors");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin go together");
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor& x = xs[i];
    STD_TORCH_CHECK(x.dim() == 3, "qk_norm_rope takes (batch, tokens, channels), not ", x.dim(), " dimensions");
    STD_TORCH_CHECK(heads > 0 && x.size(2) % (2 * heads) == 0, x.size(2), " channels make no ", heads,
                    " heads of whole pairs");
    expect("a weight", weights[i], {x.size(2)}, x.scalar_type(), x);
    if (!grads.empty()) expect_like("a gradient", grads[i], x);
    for (const Maybe* table : {&cos, &sin})
      expect("cos and sin", *table, {x.size(1), x.size(2) / heads / 2}, accumulate_type(x), x);
  }
}

}  // namespace vlmteacher
