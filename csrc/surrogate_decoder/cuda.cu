// The surrogate decoder's convolutions on NVIDIA GPUs: torch's tensors for plan.cuh.
#include "../cuda_device.h"
#include "check.h"
#include "plan.cuh"

namespace {

using namespace vlmteacher;
using surrogate_decoder::Shape;

// What the kernels may assume: frames that 32 bits address.
void check_size(const Shape& s) {
  constexpr int64_t Most = std::numeric_limits<int>::max();
  const int64_t pixels = int64_t{s.height} * s.width * s.upscale * s.upscale;
  STD_TORCH_CHECK(pixels <= Most && std::max(s.frames, 4 * s.outputs) <= 65535, "surrogate_decoder: ", s.outputs,
                  " frames of ", pixels, " pixels are too many or too large");
}

std::tuple<Tensor, Tensor> conv3x3(const Tensor& x_any, const Tensor& taps_any, const Tensor& weight_any,
                                   const Maybe& bias_any, const Maybe& residual_any, const Maybe& rows_any,
                                   std::optional<double> slope, int64_t upscale) {
  check_conv3x3(x_any, taps_any, weight_any.size(0), bias_any, residual_any, rows_any, upscale);
  expect("the weight", weight_any, {kAny, 3, 3, taps_any.size(1) * x_any.size(3)}, x_any.scalar_type(), x_any);
  const Tensor x = dense(x_any), taps = dense(taps_any), weight = dense(weight_any);
  const Maybe bias = dense(bias_any), residual = dense(residual_any), rows = dense(rows_any);
  const Shape shape{.frames = size(x, 0),
                    .outputs = size(taps, 0),
                    .taps = size(taps, 1),
                    .height = size(x, 1),
                    .width = size(x, 2),
                    .channels = size(x, 3),
                    .n = size(weight, 0),
                    .upscale = static_cast<int>(upscale),
                    .slope = static_cast<float>(slope.value_or(0))};
  check_size(shape);
  const int64_t height = shape.height * upscale, width = shape.width * upscale;
  const Tensor y = torch::stable::new_empty(x, {shape.outputs, height, width, shape.n});
  const Tensor signs =
      slope ? torch::stable::new_empty(x, {shape.outputs, height, width, (shape.n + 7) / 8}, ScalarType::Byte)
            : torch::stable::new_empty(x, {0}, ScalarType::Byte);
  with_type(x.scalar_type(), [&]<class T>() {
    Device device(x);
    surrogate_decoder::forward(device, data<T>(x), data<int>(taps), data<T>(weight), data<T>(bias), data<T>(residual),
                               data<int>(rows), shape, data<T>(y), slope ? data<uint8_t>(signs) : nullptr);
  });
  return {y, signs};
}

Tensor conv3x3_backward(const Tensor& grad_any, const Tensor& signs_any, const Tensor& taps_any, int64_t frames,
                        const Tensor& weight_any, const Maybe& residual_any, const Maybe& residual_signs_any,
                        std::optional<double> slope, int64_t upscale) {
  check_taps(grad_any, taps_any, upscale);
  expect("the weight", weight_any, {grad_any.size(3), 3, 3, kAny}, grad_any.scalar_type(), grad_any);
  STD_TORCH_CHECK(weight_any.size(3) % taps_any.size(1) == 0, "taps that do not share the weight's channels");
  check_conv3x3_backward(grad_any, signs_any, taps_any, frames, weight_any.size(3) / taps_any.size(1), residual_any,
                         residual_signs_any, slope.has_value(), upscale);
  const Tensor grad = dense(grad_any), signs = dense(signs_any), taps = dense(taps_any), weight = dense(weight_any);
  const Maybe residual = dense(residual_any), residual_signs = dense(residual_signs_any);
  const Shape shape{.frames = static_cast<int>(frames),
                    .outputs = size(taps, 0),
                    .taps = size(taps, 1),
                    .height = static_cast<int>(grad.size(1) / upscale),
                    .width = static_cast<int>(grad.size(2) / upscale),
                    .channels = static_cast<int>(weight.size(3) / taps.size(1)),
                    .n = size(weight, 0),
                    .upscale = static_cast<int>(upscale),
                    .slope = static_cast<float>(slope.value_or(0))};
  check_size(shape);
  const Tensor dx = torch::stable::new_empty(grad, {frames, shape.height, shape.width, shape.channels});
  with_type(grad.scalar_type(), [&]<class T>() {
    Device device(grad);
    surrogate_decoder::backward(device, data<T>(grad), slope ? data<uint8_t>(signs) : nullptr, data<int>(taps),
                                data<T>(weight), data<T>(residual), slope ? data<uint8_t>(residual_signs) : nullptr,
                                shape, data<T>(dx));
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cuda, m) {
  m.def(
      "conv3x3(Tensor x, Tensor taps, Tensor weight, Tensor? bias, Tensor? residual, Tensor? rows, float? slope, "
      "int upscale) -> (Tensor, Tensor)");
  m.def(
      "conv3x3_backward(Tensor grad, Tensor signs, Tensor taps, int frames, Tensor weight, Tensor? residual, "
      "Tensor? residual_signs, float? slope, int upscale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cuda, CUDA, m) {
  m.impl("conv3x3", boxed<&conv3x3>);
  m.impl("conv3x3_backward", boxed<&conv3x3_backward>);
}
