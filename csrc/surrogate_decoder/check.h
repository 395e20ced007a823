// Checks of the convolutions' arguments, shared by the backends; the definition is vlmteacher/ops/surrogate_decoder.py.
#pragma once

#include "../operator.h"

namespace vlmteacher {

inline void check_taps(const Tensor& x, const Tensor& taps, int64_t upscale) {
  STD_TORCH_CHECK(x.dim() == 4, "conv3x3 takes (frames, height, width, channels), not ", x.dim(), " dimensions");
  STD_TORCH_CHECK(upscale == 1 || upscale == 2, "upscale is 1 or 2, not ", upscale);
  expect("taps", taps, {kAny, kAny}, ScalarType::Int, x);
  STD_TORCH_CHECK(taps.size(1) == 1 || taps.size(1) == 2, "a frame sees 1 or 2 frames, not ", taps.size(1));
}

inline void check_conv3x3(const Tensor& x, const Tensor& taps, int64_t channels, const Maybe& bias,
                          const Maybe& residual, const Maybe& rows, int64_t upscale) {
  check_taps(x, taps, upscale);
  expect("the bias", bias, {channels}, x.scalar_type(), x);
  expect("the residual", residual, {kAny, x.size(1) * upscale, x.size(2) * upscale, channels}, x.scalar_type(), x);
  expect("rows", rows, {taps.size(0)}, ScalarType::Int, x);
  STD_TORCH_CHECK(residual.has_value() == rows.has_value(), "a residual comes with rows");
}

inline void check_conv3x3_backward(const Tensor& grad, const Tensor& signs, const Tensor& taps, int64_t bank,
                                   int64_t channels, const Maybe& residual, const Maybe& residual_signs,
                                   bool activation, int64_t upscale) {
  check_taps(grad, taps, upscale);
  const int64_t height = grad.size(1), width = grad.size(2);
  STD_TORCH_CHECK(bank >= 0 && height % upscale == 0 && width % upscale == 0, "no bank of ", bank,
                  " frames has a gradient of ", height, "x", width, " pixels");
  expect("the gradient", grad, {taps.size(0), height, width, kAny}, grad.scalar_type(), grad);
  if (activation) expect("signs", signs, {taps.size(0), height, width, (grad.size(3) + 7) / 8}, ScalarType::Byte, grad);
  if (!residual) return;
  STD_TORCH_CHECK(upscale == 1 && (residual_signs || !activation), "a residual comes with signs and without upscale");
  expect("the residual", residual, {taps.size(0), height, width, channels}, grad.scalar_type(), grad);
  if (activation)
    expect("residual_signs", residual_signs, {taps.size(0), height, width, (channels + 7) / 8}, ScalarType::Byte, grad);
}

}  // namespace vlmteacher
