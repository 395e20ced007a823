// The tiny decoder's convolutions on NVIDIA GPUs: torch's tensors for plan.cuh.
#include "../cuda_device.h"
#include "plan.cuh"

namespace {

using namespace vlmteacher;
using tiny_decoder::Shape;

// What the kernels may assume beside contiguity: frames that 32 bits address, one GPU.
void check(const Shape& s, const Tensor& x, const Tensor& taps, const Tensor& weight,
           std::initializer_list<std::optional<Tensor>> others) {
  constexpr int64_t Most = std::numeric_limits<int>::max();
  const int64_t pixels = int64_t{s.height} * s.width * s.upscale * s.upscale;
  STD_TORCH_CHECK(pixels <= Most && std::max(s.frames, 4 * s.outputs) <= 65535, "tiny_decoder: ", s.outputs,
                  " frames of ", pixels, " pixels are too many or too large");
  STD_TORCH_CHECK(s.upscale == 1 || s.upscale == 2, "tiny_decoder: upscale is 1 or 2, not ", s.upscale);
  STD_TORCH_CHECK(taps.scalar_type() == ScalarType::Int && weight.scalar_type() == x.scalar_type() &&
                      taps.get_device() == x.get_device() && weight.get_device() == x.get_device(),
                  "tiny_decoder: taps are int32, the other tensors of one dtype, all on one GPU");
  for (const auto& t : others)
    STD_TORCH_CHECK(!t || (t->scalar_type() == x.scalar_type() && t->get_device() == x.get_device()),
                    "tiny_decoder: a bias or residual of another dtype or GPU");
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional(torch::stable::contiguous(*t)) : std::nullopt;
}

template <class T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

std::tuple<Tensor, Tensor> conv3x3(const Tensor& x_any, const Tensor& taps_any, const Tensor& weight_any,
                                   const std::optional<Tensor>& bias_any, const std::optional<Tensor>& residual_any,
                                   const std::optional<Tensor>& rows_any, std::optional<double> slope,
                                   int64_t upscale) {
  const Tensor x = torch::stable::contiguous(x_any), taps = torch::stable::contiguous(taps_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const auto bias = contiguous(bias_any), residual = contiguous(residual_any), rows = contiguous(rows_any);
  const Shape shape{.frames = size(x, 0),
                    .outputs = size(taps, 0),
                    .taps = size(taps, 1),
                    .height = size(x, 1),
                    .width = size(x, 2),
                    .channels = size(x, 3),
                    .n = size(weight, 0),
                    .upscale = static_cast<int>(upscale),
                    .slope = static_cast<float>(slope.value_or(0))};
  check(shape, x, taps, weight, {bias, residual});
  STD_TORCH_CHECK(residual.has_value() == rows.has_value() && (!rows || rows->scalar_type() == ScalarType::Int),
                  "tiny_decoder: a residual comes with int32 rows");
  const int64_t height = shape.height * upscale, width = shape.width * upscale;
  const Tensor y = torch::stable::new_empty(x, {shape.outputs, height, width, shape.n});
  const Tensor signs =
      slope ? torch::stable::new_empty(x, {shape.outputs, height, width, (shape.n + 7) / 8}, ScalarType::Byte)
            : torch::stable::new_empty(x, {0}, ScalarType::Byte);
  with_type(x.scalar_type(), [&]<class T>() {
    Device device(x);
    tiny_decoder::forward(device, data<T>(x), data<int>(taps), data<T>(weight), data_or_null<T>(bias),
                          data_or_null<T>(residual), data_or_null<int>(rows), shape, data<T>(y),
                          slope ? data<uint8_t>(signs) : nullptr);
  });
  return {y, signs};
}

Tensor conv3x3_backward(const Tensor& grad_any, const Tensor& signs_any, const Tensor& taps_any, int64_t frames,
                        const Tensor& weight_any, const std::optional<Tensor>& residual_any,
                        const std::optional<Tensor>& residual_signs_any, std::optional<double> slope, int64_t upscale) {
  const Tensor grad = torch::stable::contiguous(grad_any), signs = torch::stable::contiguous(signs_any);
  const Tensor taps = torch::stable::contiguous(taps_any), weight = torch::stable::contiguous(weight_any);
  const auto residual = contiguous(residual_any), residual_signs = contiguous(residual_signs_any);
  const Shape shape{.frames = static_cast<int>(frames),
                    .outputs = size(taps, 0),
                    .taps = size(taps, 1),
                    .height = static_cast<int>(grad.size(1) / upscale),
                    .width = static_cast<int>(grad.size(2) / upscale),
                    .channels = static_cast<int>(weight.size(3) / taps.size(1)),
                    .n = size(weight, 0),
                    .upscale = static_cast<int>(upscale),
                    .slope = static_cast<float>(slope.value_or(0))};
  check(shape, grad, taps, weight, {residual});
  const Tensor dx = torch::stable::new_empty(grad, {frames, shape.height, shape.width, shape.channels});
  with_type(grad.scalar_type(), [&]<class T>() {
    Device device(grad);
    tiny_decoder::backward(device, data<T>(grad), slope ? data<uint8_t>(signs) : nullptr, data<int>(taps),
                           data<T>(weight), data_or_null<T>(residual),
                           slope ? data_or_null<uint8_t>(residual_signs) : nullptr, shape, data<T>(dx));
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
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_backward));
}
