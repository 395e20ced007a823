// Resize + normalise + patchify + cast on NVIDIA GPUs: torch's tensors for plan.cuh.
#include "../cuda_device.h"
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
  const int64_t height = tables.empty() ? frames.size(2) : tables[0].size(0);
  const int64_t width = tables.empty() ? frames.size(3) : tables[2].size(0);
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlmteacher_cuda, m) {
  m.def(
      "patchify(Tensor frames, int patch, int temporal_patch, int merge, float[] mean, float[] std, ScalarType dtype, "
      "Tensor[] tables) -> Tensor");
  m.def(
      "patchify_backward(Tensor grad, int num_frames, int height, int width, int patch, int temporal_patch, int merge, "
      "float[] std, int resized_height, int resized_width, ScalarType dtype, Tensor[] tables) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vlmteacher_cuda, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&forward));
  m.impl("patchify_backward", TORCH_BOX(&backward));
}
