// Resize + normalise + patchify + cast on NVIDIA GPUs: torch's tensors for plan.cuh.
#include "../cuda_device.h"
#include "check.h"
#include "plan.cuh"

namespace {

using namespace vlmteacher;

// Of the bands that tables hold (vertical start and weight, horizontal start and weight); none, if there are none.
patchify::Band band(const Tensors& tables, size_t i, int64_t columns) {
  if (tables.empty()) return {};
  return {static_cast<const int*>(tables[i].const_data_ptr()),
          static_cast<const float*>(tables[i + 1].const_data_ptr()), static_cast<int>(tables[i + 1].size(1)),
          static_cast<int>(columns)};
}

Tensor forward(const Tensor& frames, int64_t patch, int64_t temporal_patch, int64_t merge, std::vector<double> mean,
               std::vector<double> std, ScalarType dtype, Tensors tables) {
  check_frames(frames);
  const auto size = check_bands(tables, frames.size(2), frames.size(3), frames);
  const int64_t height = size.first, width = size.second;
  check_blocks(height, width, patch, patch, temporal_patch, merge, mean, std);
  for (Tensor& table : tables) table = dense(table);
  const patchify::Sizes sizes{static_cast<int>(frames.size(0)), static_cast<int>(height),
                              static_cast<int>(width),          static_cast<int>(patch),
                              static_cast<int>(temporal_patch), static_cast<int>(merge)};
  const int64_t temporal_patches = (frames.size(0) + temporal_patch - 1) / temporal_patch;
  Tensor out = torch::stable::new_empty(
      frames, {temporal_patches * (height / patch) * (width / patch), 3 * temporal_patch * patch * patch}, dtype);
  with_type(frames.scalar_type(), [&]<class T>() {
    const patchify::Pixels<const T> pixels{static_cast<const T*>(frames.const_data_ptr()), frames.stride(0),
                                           frames.stride(1), frames.stride(2), frames.stride(3)};
    with_type(dtype, [&]<class Out>() {
      Device device(frames);
      patchify::forward(device, pixels, sizes, band(tables, 0, frames.size(2)), band(tables, 2, frames.size(3)),
                        mean.data(), std.data(), static_cast<Out*>(out.mutable_data_ptr()));
    });
  });
  return out;
}

Tensor backward(const Tensor& grad, int64_t num_frames, int64_t height, int64_t width, int64_t patch,
                int64_t temporal_patch, int64_t merge, std::vector<double> std, int64_t resized_height,
                int64_t resized_width, ScalarType dtype, Tensors tables) {
  check_blocks(resized_height, resized_width, patch, patch, temporal_patch, merge, std, std);
  check_rows(grad, num_frames, resized_height, resized_width, patch, temporal_patch);
  const std::pair size = check_bands(tables, resized_height, resized_width, grad);
  STD_TORCH_CHECK(size == std::pair(height, width), "the bands do not lead to frames of ", height, "x", width);
  for (Tensor& table : tables) table = dense(table);
  const patchify::Sizes sizes{static_cast<int>(num_frames),     static_cast<int>(resized_height),
                              static_cast<int>(resized_width),  static_cast<int>(patch),
                              static_cast<int>(temporal_patch), static_cast<int>(merge)};
  const Tensor rows = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_empty(grad, {num_frames, 3, height, width}, dtype);
  with_type(rows.scalar_type(), [&]<class T>() {
    with_type(dtype, [&]<class Out>() {
      Device device(rows);
      patchify::backward(device, static_cast<const T*>(rows.const_data_ptr()), sizes, band(tables, 0, resized_height),
                         band(tables, 2, resized_width), std.data(), static_cast<int>(height), static_cast<int>(width),
                         static_cast<Out*>(out.mutable_data_ptr()));
    });
  });
  return out;
}

patchify::Shuffled shuffled(int64_t frames, int64_t height, int64_t width, int64_t upscale, int64_t patch_height,
                            int64_t patch_width, int64_t temporal_patch, int64_t merge, const Tensor& slots) {
  STD_TORCH_CHECK(frames <= 65535, "shuffle_to_rows: ", frames, " frames are too many");
  return {static_cast<int>(frames),         static_cast<int>(height),
          static_cast<int>(width),          static_cast<int>(upscale),
          static_cast<int>(patch_height),   static_cast<int>(patch_width),
          static_cast<int>(temporal_patch), static_cast<int>(merge),
          data<const int>(slots),           size(slots, 1)};
}

Tensor shuffle_to_rows(const Tensor& any_y, const Tensor& any_slots, Tensor rows, int64_t upscale, int64_t patch_height,
                       int64_t patch_width, int64_t temporal_patch, int64_t merge, std::vector<double> mean,
                       std::vector<double> std) {
  STD_TORCH_CHECK(any_y.dim() == 4, "shuffle_to_rows takes (frames, height, width, channels)");
  check_shuffle(rows, any_slots, any_y.size(1), any_y.size(2), upscale, patch_height, patch_width, temporal_patch,
                merge, mean, std);
  check_shuffled(any_y, any_slots, rows, upscale);
  const Tensor y = dense(any_y), slots = dense(any_slots);
  const auto s =
      shuffled(y.size(0), y.size(1), y.size(2), upscale, patch_height, patch_width, temporal_patch, merge, slots);
  const int64_t bytes = (y.size(2) * upscale + 7) / 8;
  Tensor inside = torch::stable::new_empty(y, {y.size(0), 3, y.size(1) * upscale, bytes}, ScalarType::Byte);
  with_type(y.scalar_type(), [&]<class T>() {
    with_type(rows.scalar_type(), [&]<class Out>() {
      Device device(y);
      patchify::shuffle_forward(device, s, data<const T>(y), data<Out>(rows), data<uint8_t>(inside), mean.data(),
                                std.data());
    });
  });
  return inside;
}

Tensor shuffle_to_rows_backward(const Tensor& any_grad, const Tensor& any_slots, const Tensor& any_inside,
                                int64_t height, int64_t width, int64_t upscale, int64_t patch_height,
                                int64_t patch_width, int64_t temporal_patch, int64_t merge, std::vector<double> mean,
                                std::vector<double> std, ScalarType dtype) {
  const Tensor grad = dense(any_grad);
  check_shuffle(grad, any_slots, height, width, upscale, patch_height, patch_width, temporal_patch, merge, mean, std);
  check_inside(any_inside, any_slots, height, width, upscale);
  const Tensor slots = dense(any_slots), inside = dense(any_inside);
  const auto s =
      shuffled(slots.size(0), height, width, upscale, patch_height, patch_width, temporal_patch, merge, slots);
  Tensor dy = torch::stable::new_empty(grad, {slots.size(0), height, width, 3 * upscale * upscale}, dtype);
  with_type(grad.scalar_type(), [&]<class T>() {
    with_type(dtype, [&]<class Out>() {
      Device device(grad);
      patchify::shuffle_backward(device, s, data<const T>(grad), data<const uint8_t>(inside), data<Out>(dy),
                                 mean.data(), std.data());
    });
  });
  return dy;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cuda, m) {
  m.def(
      "patchify(Tensor frames, int patch, int temporal_patch, int merge, float[] mean, float[] std, ScalarType dtype, "
      "Tensor[] tables) -> Tensor");
  m.def(
      "patchify_backward(Tensor grad, int num_frames, int height, int width, int patch, int temporal_patch, int merge, "
      "float[] std, int resized_height, int resized_width, ScalarType dtype, Tensor[] tables) -> Tensor");
  m.def(
      "shuffle_to_rows(Tensor y, Tensor slots, Tensor(a!) rows, int upscale, int patch_height, int patch_width, "
      "int temporal_patch, int merge, float[] mean, float[] std) -> Tensor");
  m.def(
      "shuffle_to_rows_backward(Tensor grad, Tensor slots, Tensor inside, int height, int width, int upscale, "
      "int patch_height, int patch_width, int temporal_patch, int merge, float[] mean, float[] std, ScalarType dtype) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cuda, CUDA, m) {
  m.impl("patchify", boxed<&forward>);
  m.impl("patchify_backward", boxed<&backward>);
  m.impl("shuffle_to_rows", boxed<&shuffle_to_rows>);
  m.impl("shuffle_to_rows_backward", boxed<&shuffle_to_rows_backward>);
}
