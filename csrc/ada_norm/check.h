// Checks of the operator's arguments, shared by its backends; the definition is vlmteacher/ops/ada_norm.py.
#pragma once

#include "../operator.h"

namespace vlmteacher {

inline void check_tables(const Tensor& x, const Maybe& gate, const Maybe& weight, const Maybe& bias, int64_t first) {
  STD_TORCH_CHECK(x.dim() == 3, "ada_norm takes (batch, tokens, width), not ", x.dim(), " dimensions");
  STD_TORCH_CHECK(first >= 0 && first <= x.size(1), "first must be from 0 to the ", x.size(1), " tokens, not ", first);
  const Tensor* table = gate ? &*gate : weight ? &*weight : nullptr;
  if (!table) return;
  STD_TORCH_CHECK(table->dim() == 3 && (table->size(0) == 1 || table->size(0) == x.size(0)) &&
                      (table->size(1) == 1 || table->size(1) == 2),
                  "a table must have one batch or that of x, and one row or two");
  for (const Maybe* each : {&gate, &weight, &bias})
    expect("a table", *each, {table->size(0), table->size(1), x.size(2)}, accumulate_type(x), x);
}

inline void check_ada_norm(const Tensor& x, const Maybe& y, const Maybe& gate, const Maybe& weight, const Maybe& bias,
                           int64_t first) {
  check_tables(x, gate, weight, bias, first);
  expect_like("y", y, x);
  STD_TORCH_CHECK((y || weight) && (y || !gate) && weight.has_value() == bias.has_value(),
                  "ada_norm takes y, or weight with bias, or all; a gate with y");
}

inline void check_ada_norm_backward(const Maybe& grad_out, const Maybe& grad_norm, const Maybe& kept, const Maybe& gate,
                                    const Maybe& weight, int64_t first, bool need_y) {
  STD_TORCH_CHECK((weight ? grad_norm && kept : grad_out.has_value()) && (gate || !need_y),
                  "ada_norm_backward takes grad_out, or grad_norm with kept and weight, or all; a gate for dy");
  const Tensor& like = grad_out ? *grad_out : *grad_norm;
  check_tables(like, gate, weight, {}, first);
  expect_like("grad_norm", grad_norm, like);
  expect_like("kept", kept, like);
}

}  // namespace vlmteacher
